//! Parsers of command line values that are not quantities. Impossible values are refused when the command line is
//! parsed.

use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};
use vhost_migrate::control::MAX_SOCKET_PATH;
use vhost_migrate::stream::Uri;
use vhost_migrate::unstable::with_causes;

/// Parses the path of a UNIX socket.
pub(crate) fn socket_path() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| match path.as_os_str().len() {
        ..=MAX_SOCKET_PATH => Ok(path),
        _ => {
            Err(format!("the path is longer than {MAX_SOCKET_PATH} bytes, which no socket can have: use a shorter one"))
        }
    })
}

/// Parses the entries of a queue: a power of two from `least` to `most`.
pub(crate) fn queue_size(least: u16, most: u16) -> impl Fn(&str) -> Result<u16, String> + Clone {
    move |text| {
        let size = text.parse().ok().filter(|size: &u16| size.is_power_of_two() && (least..=most).contains(size));
        size.ok_or_else(|| format!("'{text}' is not a power of two from {least} to {most}"))
    }
}

/// Parses `HOST:PORT` of a listener.
pub(crate) fn host_and_port(text: &str) -> Result<String, String> {
    let parts = text.rsplit_once(':').filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    parts.map(|_| text.into()).ok_or_else(|| format!("'{text}' is not HOST:PORT with a port from 0 to 65535"))
}

/// Parses the target of a migration.
pub(crate) fn migration_target(text: &str) -> Result<Uri, String> {
    match text.parse().map_err(|error: vhost_migrate::stream::StreamError| with_causes(&error).to_string())? {
        Uri::Tcp { port: 0, .. } => Err(format!("'{text}': nothing listens on port 0")),
        Uri::Unix(path) if path.as_os_str().len() > MAX_SOCKET_PATH => {
            Err(format!("the path is longer than {MAX_SOCKET_PATH} bytes: use a shorter one"))
        }
        uri => Ok(uri),
    }
}
