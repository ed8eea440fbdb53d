"""Writes sentencepiece.json: a small SentencePiece vocabulary and the ids that the PyPI package `sentencepiece` gives.

    pip install sentencepiece==0.2.3 && python sentencepiece_cases.py > sentencepiece.json
"""

import io
import json
import random

import sentencepiece

TEXT = """the lighthouse keeper climbs the stairs every evening and lights the lamp for the ships at sea
ships that pass in the night see the light and keep away from the rocks and the shallow water
when the fog comes the keeper sounds the horn three times every minute until the morning
in 1812 the tower was 42 metres high; in 1934 it was 57 metres high, painted red and white
der Leuchtturm steht am Meer, und das Licht brennt jede Nacht für die Schiffe auf See
le phare éclaire la mer et les navires évitent les rochers grâce à sa lumière
if light: print("on")  else: print("off")    # banana bandana ananas
"""
CASES = [
    "",
    " ",
    "the",
    " the",
    "  the  keeper  ",
    "The lighthouse keeper, in 1812!",
    "\tfor ships:\n\n    print(57)\r\n",
    "für die Schiffe auf See, éclairé",
    "дом 世界 🙂 e\u0301 \u00a0x",
    "<s>plain</s><unk><0x41>",
    "aaaaaaaaaa banananana",
    "▁the▁▁sea",
    "keeper<mine>",
]


def main():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=440,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<mine>"],
        character_coverage=1.0,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    # The numbers of llama.cpp's token types.
    kind = lambda i: 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
    ids = range(sp.get_piece_size())
    pieces = [sp.id_to_piece(i) for i in ids]
    types = [4 if piece == "<mine>" else kind(i) for i, piece in enumerate(pieces)]
    generator = random.Random(7)
    normal = [piece.replace("▁", " ") for piece, kind in zip(pieces, types) if kind == 1]
    mixed = ["".join(generator.choices(normal, k=12)) for _ in range(40)]
    mixed += ["".join(generator.choices("ban as", k=20)) for _ in range(20)]
    cases = [{"text": text, "ids": sp.encode(text), "decoded": sp.decode(sp.encode(text))} for text in CASES + mixed]
    scores = [sp.get_score(i) for i in ids]
    json.dump({"tokens": pieces, "scores": scores, "types": types, "cases": cases}, fp := io.StringIO(), ensure_ascii=False)
    print(fp.getvalue().replace('{"text"', '\n{"text"').replace('], "', '],\n"'))


main()
