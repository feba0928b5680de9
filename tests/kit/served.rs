//! A device served by a thread.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::sys::eventfd::EventFd;
use vhost_migrate::backend::{BackendListener, VirtioDevice, serve};

/// A device served by a thread of this process until it is dropped.
pub(crate) struct Served {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Served {
    pub(crate) fn new(socket: &Path, device: Arc<dyn VirtioDevice>) -> Served {
        let listener = BackendListener::bind(socket).unwrap();
        let stop = Arc::new(EventFd::new().unwrap());
        let until = stop.clone();
        let thread = Some(thread::spawn(move || serve(&listener, &device, until.as_fd()).unwrap()));
        Served { stop, thread }
    }
}

/// Stops the server. Requests in flight are complete or abandoned when this returns.
impl Drop for Served {
    fn drop(&mut self) {
        self.stop.write(1).unwrap();
        let ended = self.thread.take().map_or(Ok(()), JoinHandle::join);
        assert!(ended.is_ok() || thread::panicking(), "the back-end panicked");
    }
}
