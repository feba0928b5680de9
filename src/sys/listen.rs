//! Listening on a UNIX socket path, with words for everything that can be in the way.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use super::socket;

/// Longest path of a UNIX socket, bytes.
pub(crate) const MAX_SOCKET_PATH: usize = 107;

/// Why a path can't be listened on, and what to do.
#[derive(Debug)]
pub(crate) struct NotListening {
    pub(crate) advice: String,
    pub(crate) source: Option<io::Error>,
}

/// Listens at `path`. A socket that a dead process left there is replaced; a living one, or another file, is not.
pub(crate) fn listen(path: &Path) -> Result<UnixListener, NotListening> {
    let refused = |advice: &str, source| NotListening { advice: advice.into(), source };
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        let advice = format!("the path is longer than {MAX_SOCKET_PATH} bytes, use a shorter one");
        return Err(refused(&advice, None));
    }
    let bound = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if !std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
                return Err(refused("a file that is no socket is there, move it or use another path", None));
            }
            if !matches!(socket::connect(path), Err(e) if e.kind() == io::ErrorKind::ConnectionRefused) {
                return Err(refused("another process listens there, end it or use another path", None));
            }
            tracing::info!("{}: replaces a socket that nobody listens on", path.display());
            std::fs::remove_file(path).and_then(|()| UnixListener::bind(path))
        }
        other => other,
    };
    bound.map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::NotFound => "its directory doesn't exist, make it first".into(),
            io::ErrorKind::PermissionDenied => "no permission, use a directory you may write to".into(),
            _ => error.to_string(),
        };
        NotListening { advice, source: Some(error) }
    })
}
