//! Resolves host names on a separate thread. The system's lookup cannot be cancelled, so the thread is abandoned after
//! cancellation or the deadline.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::time::Instant;

use crossbeam::channel::bounded;

use super::Uri;
use crate::stream::StreamError;
use crate::stream::cancel::CancelToken;

/// Returns the addresses of `host`, which may be an address itself.
pub(super) fn resolve(
    uri: &Uri,
    host: &str,
    port: u16,
    cancel: &CancelToken,
    deadline: Option<Instant>,
) -> Result<Vec<SocketAddr>, StreamError> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![(address, port).into()]);
    }
    let name = host.to_owned();
    let found = run_abandonable(cancel, deadline, move || (name, port).to_socket_addrs().map(Vec::from_iter))?;
    let found = found.ok_or_else(|| {
        let advice =
            format!("the host name \"{host}\" is not found out in time: check the name server, or use an address");
        uri.error(advice, None)
    })?;
    found.map_err(|error| uri.error(format!("the host name \"{host}\" is not known"), error))
}

/// Runs `work` on a separate thread. Returns `None` if it has not ended at `deadline`.
fn run_abandonable<T: Send + 'static>(
    cancel: &CancelToken,
    deadline: Option<Instant>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>, StreamError> {
    let (tell, told) = bounded(2);
    let cancelled = tell.clone();
    let _call = cancel.on_cancel(move || _ = cancelled.try_send(None));
    let work = move || _ = tell.try_send(Some(work()));
    std::thread::Builder::new().name("look-up".into()).spawn(work)?;
    let done = match deadline {
        Some(deadline) => told.recv_deadline(deadline).ok().flatten(),
        None => told.recv().ok().flatten(),
    };
    cancel.check()?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A name server that never answers.
    #[test]
    fn a_hanging_lookup_is_abandoned_at_cancel_and_at_the_deadline() {
        let (release, held) = mpsc::channel::<()>();
        let held = std::sync::Arc::new(std::sync::Mutex::new(held));
        let hang = || {
            let held = held.clone();
            move || _ = held.lock().map(|held| held.recv())
        };
        let cancel = CancelToken::new().unwrap();
        let soon = Some(Instant::now() + Duration::from_millis(20));
        assert!(matches!(run_abandonable(&cancel, soon, hang()), Ok(None)));
        assert!(matches!(run_abandonable(&cancel, None, || 7), Ok(Some(7))));
        let (done, is_done) = mpsc::channel();
        let (switch, work) = (cancel.clone(), hang());
        std::thread::spawn(move || done.send(run_abandonable(&switch, None, work)));
        assert!(is_done.recv_timeout(Duration::from_millis(20)).is_err());
        assert!(cancel.cancel());
        let ended = is_done.recv_timeout(PATIENCE).expect("cancel ends the wait");
        assert!(matches!(ended, Err(StreamError::Cancelled)), "{ended:?}");
        drop(release);
    }
}
