//! [`Server`]: `ember serve` as a child process, and the client that asks it.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

/// Nothing that tests ask of the tiny model takes nearly as long.
const PATIENCE: Duration = Duration::from_secs(120);

/// The tiny model's end of sequence.
pub const EOS: u32 = 511;

const CHAT_TEMPLATE: &str =
    "{% for message in messages %}{{ message.role }}:{{ message.content }}\n{% endfor %}assistant:";

/// A running server. Dropping it kills the process.
pub struct Server {
    child: Child,
    address: SocketAddr,
    /// Holds the model.
    folder: Option<tempfile::TempDir>,
}

/// Dimensions of a Llama model of 0.2 million parameters; without a tokenizer, each byte is a token.
fn tiny_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 512, "max_position_embeddings": 512, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false, "rope_theta": 10000.0, "eos_token_id": EOS
    })
}

impl Server {
    /// Serves the tiny model.
    pub fn tiny(args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), tiny_config().to_string()).unwrap();
        let template = json!({"chat_template": CHAT_TEMPLATE});
        std::fs::write(folder.path().join("tokenizer_config.json"), template.to_string()).unwrap();
        let args = [&["--load-format", "dummy"], args].concat();
        let mut server = Self::start(folder.path(), &args);
        server.folder = Some(folder);
        server
    }

    /// Serves the model at `path`.
    pub fn start(path: &Path, args: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ember"))
            .arg("serve")
            .arg(path)
            .args(["--host", "127.0.0.1", "--port", "0", "--device", "cpu", "--served-model-name", "tiny"])
            .args(args)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut seen = String::new();
        let address = loop {
            let line = log.next().unwrap_or_else(|| panic!("the server ended:\n{seen}")).unwrap();
            if let Some((_, address)) = line.split_once("address=http://") {
                break address.split_whitespace().next().unwrap().parse().unwrap();
            }
            assert!(!line.contains("kv_tokens="), "the line that says ready names no address: {line}");
            seen.push_str(&line);
        };
        // A full pipe would stop the server.
        std::thread::spawn(move || log.for_each(|line| eprintln!("{}", line.unwrap_or_default())));
        Self { child, address, folder: None }
    }

    /// Sends one request on a connection of its own; dropping the response hangs up.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Response<Incoming> {
        let stream = tokio::net::TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        // Ends, and closes the socket, once `sender` and the response's body are dropped.
        tokio::spawn(connection);
        tokio::time::timeout(PATIENCE, sender.send_request(request)).await.expect("an answer").unwrap()
    }

    pub async fn post(&self, path: &str, body: &Value) -> Response<Incoming> {
        let request = Request::post(path).header("host", "test").header("content-type", "application/json");
        self.send(request.body(Full::from(body.to_string())).unwrap()).await
    }

    pub async fn get(&self, path: &str) -> String {
        let request = Request::get(path).header("host", "test").body(Full::default()).unwrap();
        text(self.send(request).await).await
    }

    /// The value of a metric's line without its labels; several lines add up.
    pub async fn metric(&self, name: &str, label: &str) -> f64 {
        let text = self.get("/metrics").await;
        let lines = text.lines().filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')));
        let values: Vec<f64> = lines
            .filter(|line| line.contains(label))
            .map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
            .collect();
        assert!(!values.is_empty(), "no {name} with {label} in\n{text}");
        values.iter().sum()
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The whole body.
pub async fn text(response: Response<Incoming>) -> String {
    let body = tokio::time::timeout(PATIENCE, response.into_body().collect()).await.expect("the answer ends");
    String::from_utf8(body.unwrap().to_bytes().to_vec()).unwrap()
}
