//! `--metrics`: counters for Prometheus to fetch over HTTP.

use std::net::ToSocketAddrs;
use std::path::PathBuf;
use std::str::FromStr;

use metrics_exporter_prometheus::PrometheusBuilder;
use vhost_migrate::{backend, frontend};

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
            Some(("tcp", address)) if address.contains(':') => Ok(Place::Tcp(address.into())),
            _ => Err("use unix:PATH or tcp:HOST:PORT".into()),
        }
    }
}

impl Metrics {
    /// Begins to count and to serve, if that is wanted.
    ///
    /// # Errors
    /// An address that can't be listened at.
    pub(crate) fn start(&self) -> Result<(), Box<dyn std::error::Error>> {
        let builder = PrometheusBuilder::new();
        let builder = match &self.metrics {
            None => return Ok(()),
            Some(Place::Unix(path)) => {
                // One that a dead process left is replaced, one that is listened at is left alone.
                drop(vhost_migrate::control::bind(path)?);
                std::fs::remove_file(path)?;
                builder.with_http_uds_listener(path)
            }
            Some(Place::Tcp(address)) => {
                let found = address.to_socket_addrs().map_err(|error| format!("--metrics tcp:{address}: {error}"))?;
                builder.with_http_listener(found.into_iter().next().ok_or("--metrics: no such address")?)
            }
        };
        builder.install().map_err(|error| format!("--metrics: {error}: is the address in use?"))?;
        backend::describe_counters();
        frontend::describe_counters();
        Ok(())
    }
}
