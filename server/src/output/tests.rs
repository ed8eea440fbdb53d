//! Every format over every cut of its text.

use super::*;

/// Adjacent pieces of a kind joined.
fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
    let mut out: Vec<Piece> = Vec::new();
    for piece in pieces {
        match (out.last_mut(), piece) {
            (Some(Piece::Content(a)), Piece::Content(b))
            | (Some(Piece::Reasoning(a)), Piece::Reasoning(b))
            | (Some(Piece::Arguments(a)), Piece::Arguments(b)) => a.push_str(&b),
            (_, piece) => out.push(piece),
        }
    }
    out
}

fn parse(make: &dyn Fn() -> AnswerParser, parts: &[&str]) -> Vec<Piece> {
    let mut parser = make();
    let mut pieces: Vec<Piece> = parts.iter().flat_map(|part| parser.push(part, false)).collect();
    pieces.extend(parser.push("", true));
    joined(pieces)
}

/// The text means the same whole, in characters, and cut anywhere.
fn check(make: &dyn Fn() -> AnswerParser, text: &str, expected: &[Piece]) {
    assert_eq!(parse(make, &[text]), expected, "{text}");
    let characters: Vec<String> = text.chars().map(String::from).collect();
    let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
    assert_eq!(parse(make, &characters), expected, "{text} in characters");
    for (at, _) in text.char_indices() {
        assert_eq!(parse(make, &[&text[..at], &text[at..]]), expected, "{text} cut at {at}");
    }
}

fn content(text: &str) -> Piece {
    Piece::Content(text.into())
}

fn reasoning(text: &str) -> Piece {
    Piece::Reasoning(text.into())
}

fn call(name: &str, arguments: &str) -> [Piece; 2] {
    [Piece::Call(name.into()), Piece::Arguments(arguments.into())]
}

#[test]
fn the_tables_are_sorted() {
    assert!(TOOL_FORMATS.windows(2).all(|pair| pair[0].name < pair[1].name));
    assert!(REASONING_FORMATS.windows(2).all(|pair| pair[0].name < pair[1].name));
    assert!(tool_format("x").err().unwrap().contains("hermes, llama3_json"));
    assert!(reasoning_format("x").unwrap_err().contains("deepseek_r1, qwen3"));
}

#[test]
fn hermes_calls_are_found_anywhere() {
    let check = |text: &str, expected: &[Piece]| {
        check(&|| AnswerParser::new(None, Some((hermes::FORMAT.parser)())), text, expected);
    };
    check("plain <b>text</b>", &[content("plain <b>text</b>")]);
    check(
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": [1, \"}\\\"\"]}}\n</tool_call>",
        &call("f", "{\"x\": [1, \"}\\\"\"]}"),
    );
    let [a, b] = call("f", "{}");
    check("Let me see.<tool_call>{\"arguments\": {}, \"name\": \"f\"}</tool_call>", &[content("Let me see."), a, b]);
    let expected = [call("f", "{\"a\":1}"), call("g", "{ }")].concat();
    check(
        "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":1}}</tool_call>\n<tool_call>\n{\"name\":\"g\",\"arguments\":{ }}</tool_call>\n",
        &expected,
    );
    check("<tool_call>no json</tool_call>", &[content("<tool_call>no json</tool_call>")]);
    check("<tool_call>{\"a\": 1}</tool_call>", &[content("<tool_call>{\"a\": 1}</tool_call>")]);
    check("<tool_call>{\"na", &[content("<tool_call>{\"na")]);
    // Cut off by max_tokens: what was sent stays.
    check("<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":", &call("f", "{\"a\":"));
    check("<tool_call>{\"name\":\"é\\u00e9\",\"n\":-1.5e3 ,\"arguments\":null}", &call("éé", "null"));
    check("a <tool_cal", &[content("a <tool_cal")]);
}

#[test]
fn llama_calls_are_the_whole_answer() {
    let check = |text: &str, expected: &[Piece]| {
        check(&|| AnswerParser::new(None, Some((llama3_json::FORMAT.parser)())), text, expected);
    };
    check("Hello {\"name\": \"f\"}", &[content("Hello {\"name\": \"f\"}")]);
    check("{\"name\": \"f\", \"parameters\": {\"x\": 1}}", &call("f", "{\"x\": 1}"));
    check("<|python_tag|>{\"name\": \"f\", \"arguments\": {\"x\": {}}}", &call("f", "{\"x\": {}}"));
    let expected = [call("f", "{}"), call("g", "{\"y\":2}")].concat();
    check(
        "{\"name\":\"f\",\"parameters\":{}}; {\"type\":\"function\",\"name\":\"g\",\"parameters\":{\"y\":2}}",
        &expected,
    );
    check("{\"answer\": 42}", &[content("{\"answer\": 42}")]);
    check("{not json", &[content("{not json")]);
    check(" \n{\"name\": 5}", &[content(" \n{\"name\": 5}")]);
    check("<|python", &[content("<|python")]);
    check("", &[]);
}

#[test]
fn forced_answers_are_calls() {
    let named = || AnswerParser::new(None, Some(Box::new(Named::new("f".into()))));
    check(&named, "{\"x\": 1}", &call("f", "{\"x\": 1}"));
    let required = || AnswerParser::new(None, Some(Box::<Required>::default()));
    let expected = [call("f", "{\"x\": \"]{\"}"), call("g", "{}")].concat();
    check(
        &required,
        "[{\"name\": \"f\", \"parameters\": {\"x\": \"]{\"}}, {\"name\":\"g\",\"parameters\":{}}]",
        &expected,
    );
}

#[test]
fn reasoning_comes_before_content_and_calls() {
    let [deepseek, qwen] = [&REASONING_FORMATS[0], &REASONING_FORMATS[1]];
    let inside = || AnswerParser::new(Some((deepseek, true)), None);
    check(&inside, "hm\nhm</think>\n\nyes", &[reasoning("hm\nhm"), content("yes")]);
    check(&inside, "<think>\nhm</think>yes", &[reasoning("hm"), content("yes")]);
    check(&inside, "hm </thin", &[reasoning("hm </thin")]);
    let outside = || AnswerParser::new(Some((qwen, false)), None);
    check(&outside, "yes </think> no", &[content("yes </think> no")]);
    check(&outside, "<think>\n\n</think>\n\nyes", &[content("yes")]);
    check(&outside, "\n<think>a</think>", &[reasoning("a")]);
    check(&outside, "<thi", &[content("<thi")]);
    let both = || AnswerParser::new(Some((qwen, false)), Some((hermes::FORMAT.parser)()));
    let text = "<think>a <tool_call> b</think>c<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>";
    let [a, b] = call("f", "{}");
    check(&both, text, &[reasoning("a <tool_call> b"), content("c"), a, b]);
}

#[test]
fn the_prompt_says_where_an_answer_begins() {
    let [deepseek, qwen] = [&REASONING_FORMATS[0], &REASONING_FORMATS[1]];
    for (prompt, of_deepseek, of_qwen) in [
        ("user: hi\nassistant:", Some(true), Some(false)),
        ("assistant:<think>\n", Some(true), Some(true)),
        ("assistant:<think>\n\n</think>\n\n", None, None),
        ("<think>a</think>b\nuser: c\nassistant:", Some(true), Some(false)),
    ] {
        assert_eq!((deepseek.begins_inside(prompt), qwen.begins_inside(prompt)), (of_deepseek, of_qwen), "{prompt}");
    }
}
