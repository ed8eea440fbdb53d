//! Random outputs under each form: all that a grammar lets through must be of its form.

use super::*;

/// Bytes, some longer tokens, and a special end.
fn compiler() -> GrammarCompiler {
    let tokenizer = Tokenizer::byte_level(300).unwrap();
    GrammarCompiler::new(&tokenizer, &[299])
}

/// Draws tokens that the grammar allows until it ends. `None` if that takes too long.
fn random_output(compiler: &GrammarCompiler, outputs: &StructuredOutputs, seed: u64) -> Option<String> {
    let grammar = compiler.compile(outputs).unwrap();
    let mut bytes = Vec::new();
    let mut state = seed;
    for _ in 0..400 {
        let mask = grammar.mask();
        let allowed: Vec<u32> = (0..300).filter(|&id| mask.allows(id)).collect();
        assert!(!allowed.is_empty(), "stuck after {:?}", String::from_utf8_lossy(&bytes));
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // The end, wherever it is allowed, half of the time: else outputs grow.
        let token = match allowed.contains(&299) && state >> 63 == 0 {
            true => 299,
            false => allowed[(state >> 33) as usize % allowed.len()],
        };
        bytes.extend(u8::try_from(token).ok());
        if token != 299 && token > 255 {
            bytes.extend(format!(" w{token}").bytes());
        }
        if grammar.push(token).unwrap() {
            return Some(String::from_utf8(bytes).expect("grammars are of text"));
        }
    }
    None
}

/// Random outputs that came to an end.
fn outputs(form: impl Into<StructuredOutputs>) -> Vec<String> {
    let (compiler, form) = (compiler(), form.into());
    let outputs: Vec<String> = (0..40).filter_map(|seed| random_output(&compiler, &form, seed)).collect();
    assert!(outputs.len() >= 8, "{form:?} rarely ends: {outputs:?}");
    outputs
}

#[test]
fn choices_are_exactly_the_choices() {
    let choices = ["red", "re\"d\\", "grün"].map(str::to_owned).to_vec();
    let got = outputs(OutputForm::Choice(choices.clone()));
    assert!(got.iter().all(|text| choices.contains(text)), "{got:?}");
    assert!(choices.iter().all(|choice| got.contains(choice)), "{got:?}");
}

#[test]
fn regular_expressions_match_in_full() {
    for text in outputs(OutputForm::Regex(r"[0-9]{3}-(a|b)+/".into())) {
        let (digits, rest) = text.split_once('-').unwrap();
        assert!(digits.len() == 3 && digits.bytes().all(|b| b.is_ascii_digit()), "{text}");
        assert!(rest.ends_with('/') && rest[..rest.len() - 1].bytes().all(|b| b"ab".contains(&b)), "{text}");
    }
}

#[test]
fn schemas_give_json_of_their_shape() {
    let schema = json!({
        "type": "object", "required": ["id", "kind"], "additionalProperties": false,
        "properties": {"id": {"type": "integer", "minimum": 1, "maximum": 99}, "kind": {"enum": ["a", "b"]},
                       "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}}
    });
    for text in outputs(OutputForm::JsonSchema(schema)) {
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!((1..=99).contains(&value["id"].as_i64().unwrap()), "{text}");
        assert!(["a", "b"].contains(&value["kind"].as_str().unwrap()), "{text}");
        assert!(value["tags"].as_array().is_none_or(|tags| tags.len() <= 2), "{text}");
        assert!(value.as_object().unwrap().len() <= 3, "{text}");
    }
}

#[test]
fn json_objects_are_objects_and_options_shape_them() {
    for text in outputs(OutputForm::JsonObject) {
        // Numbers may be out of any range, so the text is only scanned.
        let raw: &serde_json::value::RawValue = serde_json::from_str(&text).unwrap();
        assert!(raw.get().starts_with('{'), "{text}");
    }
    let schema = json!({"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"]});
    let tight = StructuredOutputs {
        disable_any_whitespace: true,
        disable_additional_properties: true,
        ..OutputForm::JsonSchema(schema.clone()).into()
    };
    assert!(outputs(tight).iter().all(|text| text == r#"{"x":null}"#));
    let spaced = StructuredOutputs {
        whitespace_pattern: Some(" ".into()),
        disable_additional_properties: true,
        ..OutputForm::JsonSchema(schema).into()
    };
    assert!(outputs(spaced).iter().all(|text| !text.contains('\n') && text.replace(' ', "") == r#"{"x":null}"#));
}

#[test]
fn grammars_are_lark_or_gbnf() {
    for grammar in ["start: \"a\" x+\nx: /[0-9]/", "root ::= \"a\" x+\nx ::= [0-9]"] {
        for text in outputs(OutputForm::Grammar(grammar.into())) {
            assert!(text.len() > 1 && text.starts_with('a'), "{text}");
            assert!(text[1..].bytes().all(|b| b.is_ascii_digit()), "{text}");
        }
    }
}

#[test]
fn wrong_forms_are_refused_by_name() {
    let compiler = compiler();
    for form in [
        OutputForm::JsonSchema(json!({"type": "nonsense"})),
        OutputForm::JsonSchema(json!([1])),
        OutputForm::JsonSchema(json!({"$ref": "#/nowhere"})),
        OutputForm::JsonSchema(json!({"type": "string", "pattern": "("})),
        OutputForm::Regex("(".into()),
        OutputForm::Choice(Vec::new()),
        OutputForm::Grammar("start: nothing".into()),
        OutputForm::Grammar("root ::= \"x".into()),
        OutputForm::Grammar(String::new()),
    ] {
        match compiler.compile(&form.clone().into()) {
            Err(Error::InvalidRequest { param: "structured_outputs", message }) => {
                assert!(message.len() < 2 * MAX_MESSAGE_CHARS, "{message}");
            }
            other => panic!("{form:?}: {other:?}"),
        }
    }
}

#[test]
fn a_grammar_can_begin_later_and_forks_are_apart() {
    let compiler = compiler();
    let form =
        StructuredOutputs { begins_after: Some(260), ..OutputForm::Choice(vec!["ab".into(), "ac".into()]).into() };
    let grammar = compiler.compile(&form).unwrap();
    assert!(grammar.mask().bits().is_empty() && grammar.mask().allows(7));
    assert_eq!(grammar.push(7), Ok(false));
    assert_eq!(grammar.push(260), Ok(false));
    assert!(grammar.mask().allows(u32::from(b'a')) && !grammar.mask().allows(u32::from(b'b')));
    assert_eq!(grammar.push(u32::from(b'a')), Ok(false));
    let fork = grammar.fork();
    assert_eq!(grammar.push(u32::from(b'b')), Ok(true));
    assert_eq!(fork.push(u32::from(b'c')), Ok(true));
    assert!(compiler.compile(&form).unwrap().mask().allows(9), "the cached one is as new");
}

#[test]
fn tokens_that_are_not_allowed_are_an_error() {
    let compiler = compiler();
    let grammar = compiler.compile(&OutputForm::Choice(vec!["ab".into()]).into()).unwrap();
    assert!(grammar.push(u32::from(b'x')).is_err());
    assert!(grammar.push(u32::from(b'a')).is_err(), "and stay one");
}
