//! `--metrics`: counters for Prometheus to fetch over HTTP.
//!
//! Each of a few threads serves one connection at a time, with a time limit. The number of connections in use is
//! therefore at most the number of threads. Further clients wait in the listener's backlog.

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

/// Number of threads that serve connections.
const THREADS: usize = 4;
/// Time limit from accepting a connection to the end of the reply.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Delay after a connection could not be accepted, for example for lack of file descriptors.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Maximum size of a request in bytes.
const MAX_REQUEST: usize = 8 << 10;

/// Arguments for metrics.
#[derive(Debug, clap::Args)]
pub(crate) struct MetricsArguments {
    /// Serve counters to Prometheus (HTTP, GET /metrics) here: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "URI")]
    metrics: Option<MetricsAddress>,
}

#[derive(Debug, Clone)]
enum MetricsAddress {
    Unix(PathBuf),
    Tcp(String),
}

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<MetricsAddress, String> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(MetricsAddress::Unix(path.into())),
            Some(("tcp", address)) => values::host_and_port(address).map(MetricsAddress::Tcp),
            _ => Err("use unix:PATH or tcp:HOST:PORT".into()),
        }
    }
}

impl MetricsArguments {
    /// Returns true if the metrics are served at a UNIX socket.
    pub(crate) fn has_socket(&self) -> bool {
        matches!(self.metrics, Some(MetricsAddress::Unix(_)))
    }

    /// Starts counting and serving, if requested.
    ///
    /// # Errors
    /// An error if the address cannot be used.
    pub(crate) fn start(&self) -> Result<(), Box<dyn std::error::Error>> {
        let Some(place) = &self.metrics else { return Ok(()) };
        match place {
            MetricsAddress::Unix(path) => {
                let (listener, path) = control::bind(path)?;
                serve(&MetricsListener::Unix(listener))?;
                // The socket exists until the process ends. `control::remove_sockets` removes it.
                std::mem::forget(path);
            }
            MetricsAddress::Tcp(address) => {
                let listener = TcpListener::bind(address.as_str())
                    .map_err(|error| format!("--metrics tcp:{address}: {error}: is the address in use?"))?;
                serve(&MetricsListener::Tcp(listener))?;
            }
        }
        backend::describe_counters();
        frontend::describe_counters();
        Ok(())
    }
}

enum MetricsListener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

trait MetricsConnection: Read + Write {
    fn limit(&self, left: Duration) -> io::Result<()>;
}

impl MetricsConnection for TcpStream {
    fn limit(&self, left: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(left)).and_then(|()| self.set_write_timeout(Some(left)))
    }
}

impl MetricsConnection for UnixStream {
    fn limit(&self, left: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(left)).and_then(|()| self.set_write_timeout(Some(left)))
    }
}

impl MetricsListener {
    fn accept(&self) -> io::Result<Box<dyn MetricsConnection>> {
        Ok(match self {
            MetricsListener::Tcp(listener) => Box::new(listener.accept()?.0),
            MetricsListener::Unix(listener) => Box::new(listener.accept()?.0),
        })
    }

    fn try_clone(&self) -> io::Result<MetricsListener> {
        Ok(match self {
            MetricsListener::Tcp(listener) => MetricsListener::Tcp(listener.try_clone()?),
            MetricsListener::Unix(listener) => MetricsListener::Unix(listener.try_clone()?),
        })
    }
}

fn serve(listener: &MetricsListener) -> Result<(), Box<dyn std::error::Error>> {
    let counters = PrometheusBuilder::new().install_recorder()?;
    for _ in 0..THREADS {
        let (listener, counters) = (listener.try_clone()?, counters.clone());
        thread::Builder::new().name("metrics".into()).spawn(move || answer_all(&listener, &counters))?;
    }
    Ok(())
}

fn answer_all(listener: &MetricsListener, counters: &PrometheusHandle) {
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
                thread::sleep(RETRY_DELAY);
            }
        }
    }
}

/// Reads one request and sends the reply.
fn answer(connection: &mut dyn MetricsConnection, counters: &PrometheusHandle) -> io::Result<()> {
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    let limit = |connection: &dyn MetricsConnection| {
        // A timeout of zero would disable the time limit.
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
