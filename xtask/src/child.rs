//! Child processes that are never left behind: they stop when this process is interrupted, fails or returns.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

const POLL: Duration = Duration::from_millis(25);
/// How long a child may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(15);
const HTTP_TIMEOUT: Duration = Duration::from_secs(2);

/// Set once this process is asked to stop. Further signals change nothing: one request to stop often comes twice
/// (from a terminal or `timeout`, to the process and to its group), and children must not outlive this process.
#[derive(Clone)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    pub fn install() -> Result<Interrupt> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&flag))?;
        }
        Ok(Interrupt(flag))
    }

    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            bail!("interrupted");
        }
        Ok(())
    }
}

/// A child that is stopped when dropped.
pub struct Guarded(Child);

impl Guarded {
    pub fn spawn(command: &mut Command) -> Result<Guarded> {
        let program = command.get_program().to_string_lossy().into_owned();
        // A group of its own: a terminal's Ctrl-C reaches only this process, which then stops its children in order.
        let child = command.process_group(0).stdin(Stdio::null()).spawn();
        Ok(Guarded(child.with_context(|| format!("cannot start {program}"))?))
    }

    /// SIGTERM to the child's whole group, then SIGKILL after a grace.
    fn stop(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.0.try_wait()? {
            return Ok(status);
        }
        self.signal("TERM");
        let deadline = Instant::now() + GRACE;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            sleep(POLL);
        }
        self.signal("KILL");
        // Should the shell have failed, the wait must still end.
        self.0.kill()?;
        Ok(self.0.wait()?)
    }

    fn signal(&self, name: &str) {
        // The shell's own `kill`: minimal machines lack the program.
        let script = format!("kill -s {name} -- -{}", self.0.id());
        let _ = Command::new("sh").args(["-c", &script]).stderr(Stdio::null()).status();
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// Runs a command to its end, its output shown; stops it when interrupted.
pub fn run(command: &mut Command, interrupt: &Interrupt) -> Result<ExitStatus> {
    Ok(run_within(command, Duration::MAX, interrupt)?.expect("no limit passes"))
}

/// As `run`, for `limit` at most: None if the command was still running then, and was stopped.
pub fn run_within(command: &mut Command, limit: Duration, interrupt: &Interrupt) -> Result<Option<ExitStatus>> {
    interrupt.check()?;
    let started = Instant::now();
    let mut child = Guarded::spawn(command)?;
    while started.elapsed() < limit {
        if let Some(status) = child.0.try_wait()? {
            return Ok(Some(status));
        }
        interrupt.check()?;
        sleep(POLL);
    }
    Ok(None)
}

/// As `run`, and a failed command is an error that names `what`.
pub fn run_ok(command: &mut Command, interrupt: &Interrupt, what: &str) -> Result<()> {
    let status = run(command, interrupt)?;
    if !status.success() {
        bail!("{what} failed ({status})");
    }
    Ok(())
}

/// A server under measurement, on a free port of this machine; stopped when dropped.
pub struct Server {
    child: Guarded,
    pub port: u16,
    log: PathBuf,
    /// From process start to the first 200 of /health.
    pub ready: Duration,
}

impl Server {
    /// Starts `command` with `--host 127.0.0.1 --port FREE` added and its output in `log`; returns once GET /health
    /// answers 200.
    pub fn start(mut command: Command, log: &Path, limit: Duration, interrupt: &Interrupt) -> Result<Server> {
        let port = free_port()?;
        let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        command.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
        command.stdout(file.try_clone()?).stderr(file);
        let start = Instant::now();
        let child = Guarded::spawn(&mut command)?;
        let mut server = Server { child, port, log: log.to_path_buf(), ready: Duration::ZERO };
        loop {
            interrupt.check()?;
            server.check_alive()?;
            if http_get(port, "/health").is_ok_and(|it| it.0 == 200) {
                server.ready = start.elapsed();
                return Ok(server);
            }
            if start.elapsed() > limit {
                bail!("the server was not ready after {} s; its log ends:\n{}", limit.as_secs(), tail(log));
            }
            sleep(POLL);
        }
    }

    /// An error with the end of the log when the server has ended by itself.
    pub fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.0.try_wait()? {
            bail!("the server ended by itself ({status}); its log {} ends:\n{}", self.log.display(), tail(&self.log));
        }
        Ok(())
    }

    /// Peak resident memory so far, in MiB, where the system tells.
    pub fn peak_memory_mib(&self) -> Option<u64> {
        Some(self.memory_kib("VmHWM:")? / 1024)
    }

    /// Resident memory in MiB.
    pub fn resident_mib(&self) -> Result<f64> {
        let kib = self.memory_kib("VmRSS:").context("/proc does not tell the server's resident memory")?;
        Ok(kib as f64 / 1024.0)
    }

    fn memory_kib(&self, name: &str) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.0.id())).ok()?;
        let line = status.lines().find_map(|it| it.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.trim().parse().ok()
    }

    /// Asks the server to drain and end; an error when it had to be killed or ended badly.
    pub fn stop(mut self) -> Result<()> {
        let status = self.child.stop()?;
        if !status.success() {
            bail!("the server did not end cleanly ({status}); its log ends:\n{}", tail(&self.log));
        }
        Ok(())
    }
}

/// A port that was free a moment ago.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0").context("no free port")?.local_addr()?.port())
}

/// Status and body of a GET on this machine. HTTP/1.0, so that the body simply ends with the connection.
pub fn http_get(port: u16, path: &str) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), HTTP_TIMEOUT)?;
    stream.set_read_timeout(Some(HTTP_TIMEOUT))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    let status = head.split(' ').nth(1).and_then(|it| it.parse().ok()).context("the answer has no status")?;
    Ok((status, body.to_owned()))
}

/// The last lines of a log file.
fn tail(path: &Path) -> String {
    let text = fs::read(path).map(|it| String::from_utf8_lossy(&it).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temp_log() -> (xshell::TempDir, PathBuf) {
        let dir = xshell::Shell::new().unwrap().create_temp_dir().unwrap();
        let log = dir.path().join("server.log");
        (dir, log)
    }

    fn idle() -> Interrupt {
        Interrupt(Arc::new(AtomicBool::new(false)))
    }

    /// A server in Python that answers 503 twice before it is ready, and ends cleanly on SIGTERM.
    fn fake_server() -> Command {
        let script = "\
import http.server, signal, sys
n = 0
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global n
        n += 1
        self.send_response(503 if n < 3 else 200)
        self.end_headers()
        self.wfile.write(b'body of ' + self.path.encode())
signal.signal(signal.SIGTERM, lambda *a: sys.exit(0))
port = int(sys.argv[sys.argv.index('--port') + 1])
http.server.HTTPServer(('127.0.0.1', port), H).serve_forever()
";
        let mut command = Command::new("python3");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_server_is_waited_for_and_stopped() {
        let (_dir, log) = temp_log();
        let mut server = Server::start(fake_server(), &log, Duration::from_secs(30), &idle()).unwrap();
        server.check_alive().unwrap();
        assert_eq!(http_get(server.port, "/v1/models").unwrap(), (200, "body of /v1/models".to_owned()));
        let port = server.port;
        server.stop().unwrap();
        assert!(http_get(port, "/health").is_err());
    }

    #[test]
    fn a_server_that_fails_at_start_shows_its_log() {
        let (_dir, log) = temp_log();
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such model >&2; exit 3"]);
        let Err(err) = Server::start(command, &log, Duration::from_secs(30), &idle()) else {
            panic!("the server cannot have started");
        };
        let text = err.to_string();
        assert!(text.contains("no such model") && text.contains('3'), "{text}");
    }

    #[test]
    fn an_interrupt_stops_the_running_command() {
        let interrupt = idle();
        let setter = interrupt.clone();
        let thread = std::thread::spawn(move || {
            sleep(Duration::from_millis(200));
            setter.0.store(true, Ordering::Relaxed);
        });
        let start = Instant::now();
        let err = run(Command::new("sleep").arg("60"), &interrupt).unwrap_err();
        thread.join().unwrap();
        assert_eq!(err.to_string(), "interrupted");
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
