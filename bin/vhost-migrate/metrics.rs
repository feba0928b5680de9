//! `--metrics`: counters for Prometheus to fetch over HTTP.
//!
//! A few threads answer, each one connection after the other and each request within a limit. So whatever connects, there
//! are never more descriptors in use than threads; more clients wait in the system's queue.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use vhost_migrate::{backend, control, frontend};

use crate::values;

/// Connections that are answered at the same time.
const CONNECTIONS: usize = 4;
/// Longest time from a connection to the end of its answer.
const LIMIT: Duration = Duration::from_secs(2);
/// The pause when the system has no descriptor left.
const RETRY: Duration = Duration::from_secs(1);
/// Longest request, bytes.
const MAX_REQUEST: usize = 8 << 10;

/// What is counted, and where it can be read.
#[derive(Debug, clap::Args)]
pub(crate) struct Metrics {
    /// Serve counters to Prometheus (HTTP, GET /metrics) here: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "URI")]
    metrics: Option<Place>,
}

#[derive(Debug, Clone)]
enum Place {
    Unix(PathBuf),
    Tcp(String),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Place, String> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Place::Unix(path.into())),
            Some(("tcp", address)) => values::address(address).map(Place::Tcp),
            _ => Err("use unix:PATH or tcp:HOST:PORT".into()),
        }
    }
}

impl Metrics {
    /// Returns true if they are served at a socket that has a path.
    pub(crate) fn has_socket(&self) -> bool {
        matches!(self.metrics, Some(Place::Unix(_)))
    }

    /// Begins to count and to serve, if that is wanted.
    ///
    /// # Errors
    /// An address that can't be listened at.
    pub(crate) fn start(&self) -> Result<(), Box<dyn std::error::Error>> {
        let Some(place) = &self.metrics else { return Ok(()) };
        match place {
            Place::Unix(path) => {
                let (listener, path) = control::bind(path)?;
                serve(&Listener::Unix(listener))?;
                // It is there as long as this process, which removes it at its end.
                std::mem::forget(path);
            }
            Place::Tcp(address) => {
                let listener = TcpListener::bind(address.as_str())
                    .map_err(|error| format!("--metrics tcp:{address}: {error}: is the address in use?"))?;
                serve(&Listener::Tcp(listener))?;
            }
        }
        backend::describe_counters();
        frontend::describe_counters();
        Ok(())
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

trait Connection: Read + Write {
    fn limit(&self, left: Duration) -> io::Result<()>;
}

impl Connection for TcpStream {
    fn limit(&self, left: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(left)).and_then(|()| self.set_write_timeout(Some(left)))
    }
}

impl Connection for UnixStream {
    fn limit(&self, left: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(left)).and_then(|()| self.set_write_timeout(Some(left)))
    }
}

impl Listener {
    fn accept(&self) -> io::Result<Box<dyn Connection>> {
        Ok(match self {
            Listener::Tcp(listener) => Box::new(listener.accept()?.0),
            Listener::Unix(listener) => Box::new(listener.accept()?.0),
        })
    }

    fn try_clone(&self) -> io::Result<Listener> {
        Ok(match self {
            Listener::Tcp(listener) => Listener::Tcp(listener.try_clone()?),
            Listener::Unix(listener) => Listener::Unix(listener.try_clone()?),
        })
    }
}

fn serve(listener: &Listener) -> Result<(), Box<dyn std::error::Error>> {
    let counters = PrometheusBuilder::new().install_recorder()?;
    for _ in 0..CONNECTIONS {
        let (listener, counters) = (listener.try_clone()?, counters.clone());
        thread::Builder::new().name("metrics".into()).spawn(move || answer_all(&listener, &counters))?;
    }
    Ok(())
}

fn answer_all(listener: &Listener, counters: &PrometheusHandle) {
    let mut failing = false;
    loop {
        match listener.accept() {
            Ok(mut connection) => {
                failing = false;
                if let Err(error) = answer(connection.as_mut(), counters) {
                    tracing::debug!("metrics: {error}");
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!("metrics: can't accept a connection, and goes on trying: {error}");
                }
                thread::sleep(RETRY);
            }
        }
    }
}

/// Reads one request and answers it.
fn answer(connection: &mut dyn Connection, counters: &PrometheusHandle) -> io::Result<()> {
    let deadline = Instant::now() + LIMIT;
    let limit = |connection: &dyn Connection| {
        // A limit of nothing would be none.
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { connection.limit(left) }
    };
    let mut request = Vec::new();
    let mut chunk = [0; 1024];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        limit(connection)?;
        match connection.read(&mut chunk)? {
            0 => return Ok(()),
            _ if request.len() >= MAX_REQUEST => return Err(io::ErrorKind::FileTooLarge.into()),
            count => request.extend(chunk.get(..count).unwrap_or_default()),
        }
    }
    let (status, body) = match request.starts_with(b"GET ") {
        true => ("200 OK", counters.render()),
        false => ("405 Method Not Allowed", String::new()),
    };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    let answer = [head.as_bytes(), body.as_bytes()].concat();
    let mut rest = answer.as_slice();
    while !rest.is_empty() {
        limit(connection)?;
        match connection.write(rest)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => rest = rest.get(count..).unwrap_or_default(),
        }
    }
    Ok(())
}
