"""OpenAI's and Anthropic's own Python clients against a server: clients_check.py GENERATE_URL EMBED_URL

GENERATE_URL serves SmolLM2 with the tool parser hermes, EMBED_URL all-MiniLM-L6-v2. Plain and streamed answers of every
endpoint that the clients know, read by the clients' own types; wrong requests must raise the clients' own errors.
"""

import sys

import anthropic
import openai

MESSAGES = [{"role": "user", "content": "Say hello in one short sentence."}]
PARAMETERS = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
              "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": PARAMETERS}}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"],
          "additionalProperties": False}


def check_models(client):
    assert [model.id for model in client.models.list()] == ["smollm2"]


def check_chat(client):
    answer = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, max_completion_tokens=12, temperature=0, seed=1, logprobs=True,
        top_logprobs=2, n=1, stop=["###"])
    choice = answer.choices[0]
    assert choice.message.content and choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    stream = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, max_completion_tokens=12, temperature=0, seed=1, stream=True,
        stream_options={"include_usage": True})
    text, usage, finish = "", None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for part in chunk.choices:
            text += part.delta.content or ""
            finish = part.finish_reason or finish
    assert (text, finish, usage.completion_tokens) == (
        choice.message.content, choice.finish_reason, answer.usage.completion_tokens), text
    several = client.chat.completions.create(model="smollm2", messages=MESSAGES, max_tokens=4, temperature=1, n=3)
    assert [choice.index for choice in several.choices] == [0, 1, 2]


def check_structured(client):
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(model="smollm2", messages=MESSAGES, max_tokens=60, response_format=form)
    assert answer.choices[0].message.content.strip().startswith("{")


def check_tools(client):
    arguments = dict(model="smollm2", messages=MESSAGES, tools=[TOOL], tool_choice="required",
                     parallel_tool_calls=False, max_tokens=80, temperature=0)
    call = client.chat.completions.create(**arguments).choices[0].message.tool_calls[0]
    assert call.function.name == "weather" and ("Oslo" in call.function.arguments or "Rome" in call.function.arguments)
    name, text = "", ""
    for chunk in client.chat.completions.create(**arguments, stream=True):
        for part in chunk.choices[0].delta.tool_calls or [] if chunk.choices else []:
            name += part.function.name or ""
            text += part.function.arguments or ""
    assert (name, text) == ("weather", call.function.arguments)
    with client.chat.completions.stream(**arguments) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


def check_completions(client):
    arguments = dict(model="smollm2", prompt=["One, two,", "The sky is"], max_tokens=6, temperature=0)
    answer = client.completions.create(**arguments, logprobs=1, echo=True)
    assert [choice.text.startswith(prompt) for choice, prompt in zip(answer.choices, arguments["prompt"])] == [True, True]
    whole = client.completions.create(**arguments)
    texts = ["", ""]
    for chunk in client.completions.create(**arguments, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]


def check_responses(client):
    answer = client.responses.create(model="smollm2", input="Say hello.", max_output_tokens=12, temperature=0,
                                     instructions="Be short.")
    assert answer.output_text and answer.usage.output_tokens > 0 and answer.status in ("completed", "incomplete")
    text, kinds = "", []
    for event in client.responses.create(model="smollm2", input="Say hello.", max_output_tokens=12, temperature=0,
                                         instructions="Be short.", stream=True):
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
    assert text == answer.output_text and kinds[0] == "response.created", kinds
    assert kinds[-1] in ("response.completed", "response.incomplete"), kinds
    tool = {"type": "function", "name": "weather", "parameters": PARAMETERS}
    called = client.responses.create(model="smollm2", input="Weather?", tools=[tool], tool_choice="required",
                                     parallel_tool_calls=False, max_output_tokens=80, temperature=0)
    assert [item.type for item in called.output] == ["function_call"] and called.output[0].name == "weather"


def check_errors(client):
    for error, request in [
        (openai.BadRequestError, dict(model="smollm2", messages=MESSAGES, temperature=9)),
        (openai.BadRequestError, dict(model="smollm2", messages=[])),
        (openai.NotFoundError, dict(model="none", messages=MESSAGES)),
    ]:
        try:
            client.chat.completions.create(**request)
        except error as raised:
            assert raised.body["message"], raised
        else:
            raise AssertionError(f"{request} was answered")


def check_embeddings(client):
    texts = ["A cat sits on the mat.", "A feline rests on a rug.", "Stock prices fell."]
    # The client asks for base64 unless told otherwise, and decodes it.
    packed = client.embeddings.create(model="minilm", input=texts)
    plain = client.embeddings.create(model="minilm", input=texts, encoding_format="float")
    vectors = [item.embedding for item in packed.data]
    assert all(abs(a - b) < 1e-6 for x, y in zip(vectors, plain.data) for a, b in zip(x, y.embedding))
    near, far = (sum(a * b for a, b in zip(vectors[0], other)) for other in vectors[1:])
    assert near > 0.5 > far and packed.usage.prompt_tokens > 0, (near, far)


def check_messages(client):
    # The client's own signature has no temperature any more.
    arguments = dict(model="smollm2", max_tokens=12, system="Be short.", messages=MESSAGES,
                     extra_body={"temperature": 0})
    answer = client.messages.create(**arguments)
    assert answer.content[0].type == "text" and answer.stop_reason in ("end_turn", "max_tokens")
    with client.messages.stream(**arguments) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == answer.content[0].text == final.content[0].text
    assert final.usage.output_tokens == answer.usage.output_tokens
    counted = client.messages.count_tokens(model="smollm2", system="Be short.", messages=MESSAGES)
    assert counted.input_tokens == answer.usage.input_tokens
    tool = {"name": "weather", "description": "Weather of a city", "input_schema": PARAMETERS}
    called = client.messages.create(**{**arguments, "max_tokens": 80}, tools=[tool],
                                    tool_choice={"type": "tool", "name": "weather"})
    assert called.stop_reason == "tool_use" and called.content[-1].input["city"] in ("Oslo", "Rome"), called
    for error, change in [(anthropic.BadRequestError, {"max_tokens": 0}), (anthropic.NotFoundError, {"model": "none"})]:
        try:
            client.messages.create(**{**arguments, **change})
        except error as raised:
            assert raised.body["type"] == "error" and raised.body["error"]["message"], raised
        else:
            raise AssertionError(f"{change} was answered")


def main():
    generate, embed = (url.rstrip("/") for url in sys.argv[1:3])
    ours = openai.OpenAI(base_url=generate + "/v1", api_key="none", max_retries=0)
    for check in [check_models, check_chat, check_structured, check_tools, check_completions, check_responses,
                  check_errors]:
        check(ours)
        print(f"openai {openai.__version__}: {check.__name__.removeprefix('check_')}")
    check_embeddings(openai.OpenAI(base_url=embed + "/v1", api_key="none", max_retries=0))
    print(f"openai {openai.__version__}: embeddings")
    check_messages(anthropic.Anthropic(base_url=generate, api_key="none", max_retries=0))
    print(f"anthropic {anthropic.__version__}: messages")


if __name__ == "__main__":
    main()
