//! `--config file.yaml`: options of a file as if they had been typed. What is typed wins.

use std::{collections::HashSet, path::Path};

use serde_json::{Map, Value};

const FLAG: &str = "--config";

/// Replaces `--config FILE` in `args` (`ember serve ...`) by the options in the file that are not typed themselves.
///
/// # Errors
/// What is wrong with the file, and its name.
pub fn expand(args: Vec<String>) -> Result<Vec<String>, String> {
    let mut typed = Vec::with_capacity(args.len());
    let mut options = Vec::new();
    let mut rest = args.into_iter();
    while let Some(arg) = rest.next() {
        let file = match arg.split_once('=') {
            Some((FLAG, file)) => file.to_owned(),
            _ if arg == FLAG => rest.next().ok_or(format!("{FLAG} needs the name of a file"))?,
            _ => {
                typed.push(arg);
                continue;
            }
        };
        options.extend(read(Path::new(&file)).map_err(|message| format!("{FLAG} {file}: {message}"))?);
    }
    let names: HashSet<&str> = typed.iter().filter_map(|arg| option_name(arg)).collect();
    let mut from_file = Vec::new();
    for (name, value) in options {
        if !names.contains(name.strip_prefix("no-").unwrap_or(&name)) {
            from_file.extend(spelled(&name, value)?);
        }
    }
    // Before what is typed, where a list cannot swallow the model.
    let at = typed.len().min(2);
    let tail = typed.split_off(at);
    typed.extend(from_file);
    typed.extend(tail);
    Ok(typed)
}

/// `--no-x=1` is about `x`.
fn option_name(arg: &str) -> Option<&str> {
    let name = arg.strip_prefix("--")?;
    let name = name.split_once('=').map_or(name, |(name, _)| name);
    Some(name.strip_prefix("no-").unwrap_or(name))
}

fn read(path: &Path) -> Result<Vec<(String, Value)>, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let options: Option<Map<String, Value>> =
        serde_saphyr::from_str(&text).map_err(|error| format!("not a YAML map of options: {error}"))?;
    Ok(options.unwrap_or_default().into_iter().map(|(name, value)| (name.replace('_', "-"), value)).collect())
}

/// The option as it would be typed.
fn spelled(name: &str, value: Value) -> Result<Vec<String>, String> {
    let flag = format!("--{name}");
    Ok(match value {
        Value::Null => Vec::new(),
        Value::Bool(true) => vec![flag],
        Value::Bool(false) if name == "enable-prefix-caching" => vec![format!("--no-{name}")],
        Value::Bool(false) => Vec::new(),
        Value::Array(values) => {
            let texts = values.iter().map(text);
            texts.map(|text| format!("{flag}={text}")).collect()
        }
        value => vec![format!("{flag}={}", text(&value))],
    })
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(yaml: &str, args: &str) -> Result<String, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ember.yaml");
        std::fs::write(&path, yaml).unwrap();
        let args = args.replace("FILE", &path.display().to_string());
        expand(args.split(' ').map(str::to_owned).collect()).map(|args| args.join(" "))
    }

    #[test]
    fn options_of_the_file_come_before_what_is_typed() {
        let yaml = "port: 81\nserved_model_name: [a, b]\nenable-prefix-caching: false\nenable-request-id-headers: true\nseed:\n";
        assert_eq!(
            expanded(yaml, "ember serve --config FILE m --host h").unwrap(),
            "ember serve --port=81 --served-model-name=a --served-model-name=b --no-enable-prefix-caching \
             --enable-request-id-headers m --host h"
        );
        assert_eq!(
            expanded("port: 81\nseed: 5", "ember serve m --config=FILE --port 9").unwrap(),
            "ember serve --seed=5 m --port 9"
        );
        let typed = "ember serve m --enable-prefix-caching --config FILE";
        assert_eq!(expanded("no-enable-prefix-caching: true", typed).unwrap(), "ember serve m --enable-prefix-caching");
        assert_eq!(expanded("# nothing\n", "ember serve --config FILE m").unwrap(), "ember serve m");
    }

    #[test]
    fn files_that_cannot_be_are_named() {
        assert!(expanded("- a\n", "ember serve --config FILE").unwrap_err().contains("ember.yaml: not a YAML map"));
        assert!(expanded("a: [", "ember serve --config FILE").unwrap_err().contains("ember.yaml: not a YAML map"));
        let missing = expand(["ember", "serve", "--config", "/nowhere.yaml"].map(str::to_owned).to_vec());
        assert!(missing.unwrap_err().starts_with("--config /nowhere.yaml: "));
        assert!(expand(vec!["ember".into(), "--config".into()]).unwrap_err().contains("needs"));
    }
}
