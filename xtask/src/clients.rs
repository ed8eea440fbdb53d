//! `cargo xtask clients`: strangers' programs against the built server. OpenAI's and Anthropic's Python clients,
//! schemathesis over the OpenAPI document, and a browser on the built-in page.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use xshell::{Shell, cmd};

use crate::child::{self, Interrupt, Server};
use crate::dummy_model::TINY;
use crate::{cache_dir, model, project_root, pypi, target_dir};

const READY_LIMIT: Duration = Duration::from_secs(120);
/// Folder of the scripts.
const SCRIPTS: &str = "xtask/reference";
/// What schemathesis may find of each operation: a bug costs one example, no more are needed.
const MAX_EXAMPLES: &str = "40";

#[derive(Args)]
pub struct ClientsArgs {
    /// The server to run. Default: the one that `cargo test` has built.
    #[arg(long, value_name = "FILE")]
    ember: Option<PathBuf>,
    /// Leave the browser out.
    #[arg(long)]
    no_browser: bool,
}

pub fn run(args: &ClientsArgs) -> Result<()> {
    let interrupt = Interrupt::install()?;
    let ember = args.ember.clone().unwrap_or_else(|| target_dir().join("debug/ember"));
    check(&ember, !args.no_browser, &interrupt)
}

/// As a step of CI.
pub fn check_all(interrupt: &Interrupt) -> Result<()> {
    check(&target_dir().join("debug/ember"), true, interrupt)
}

fn check(ember: &Path, with_browser: bool, interrupt: &Interrupt) -> Result<()> {
    let out = target_dir().join("clients");
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let bin = environment()?.join("bin");
    let start = |(name, path): (&str, PathBuf), flags: &[&str]| {
        let mut command = Command::new(ember);
        command.arg("serve").arg(path).args(["--served-model-name", name, "--device", "cpu"]).args(flags);
        Server::start(command, &out.join(format!("{name}.log")), READY_LIMIT, interrupt)
    };
    let tools = ["--tool-call-parser", "hermes", "--enable-auto-tool-choice"];
    let generating = start(("smollm2", model::fetch("smollm2")?), &tools)?;
    let mut embedding = start(("minilm", model::fetch("minilm")?), &[])?;
    // Made-up requests may ask for 16,384 answers at once: short ones, of a model that takes no time.
    let short = ["--load-format", "dummy", "--override-generation-config", r#"{"max_new_tokens": 4}"#];
    let mut tiny = start((TINY.name, TINY.write(&out)?), &[&tools[..], &short].concat())?;
    let url = |server: &Server| format!("http://127.0.0.1:{}", server.port);
    let script = |name: &str| project_root().join(SCRIPTS).join(name);

    let mut clients = Command::new(bin.join("python"));
    clients.arg(script("clients_check.py")).args([url(&generating), url(&embedding)]);
    child::run_ok(&mut clients, interrupt, "clients_check.py")?;
    if with_browser {
        let mut page = Command::new(bin.join("python"));
        page.arg(script("page_check.py")).arg(url(&generating));
        child::run_ok(&mut page, interrupt, "page_check.py (needs chromium and chromedriver)")?;
    }
    for server in [&mut tiny, &mut embedding] {
        let mut schemathesis = Command::new(bin.join("schemathesis"));
        schemathesis.current_dir(&out).args(["run", &format!("{}/openapi.json", url(server))]);
        schemathesis.args(["--checks", "not_a_server_error", "--max-examples", MAX_EXAMPLES, "--seed", "1"]);
        schemathesis.args(["--phases", "examples,coverage,fuzzing", "--request-timeout", "60"]);
        child::run_ok(&mut schemathesis, interrupt, "schemathesis")?;
        server.check_alive()?;
    }
    [generating, embedding, tiny].into_iter().try_for_each(Server::stop)
}

/// A Python environment with the packages of requirements.txt, kept in the cache and named for their versions.
fn environment() -> Result<PathBuf> {
    let sh = Shell::new()?;
    let requirements = project_root().join(SCRIPTS).join("requirements.txt");
    let dest = cache_dir()?.join(format!("clients-{}", &pypi::sha256(&sh, &requirements)?[..12]));
    // Written last, so that a folder without it is a broken installation.
    let mark = dest.join("complete");
    if mark.is_file() {
        return Ok(dest);
    }
    if dest.is_dir() {
        fs::remove_dir_all(&dest).with_context(|| format!("cannot replace {}", dest.display()))?;
    }
    eprintln!("installing the clients in {} …", dest.display());
    cmd!(sh, "python3 -m venv {dest}")
        .quiet()
        .run()
        .context("python3 cannot make environments: install python3-venv")?;
    let pip = dest.join("bin/pip");
    cmd!(sh, "{pip} install -q --disable-pip-version-check -r {requirements}").quiet().run()?;
    fs::write(&mark, "")?;
    Ok(dest)
}
