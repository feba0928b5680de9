//! Write-back of the page cache during a migration, so that little is left when the rings stop (rule I11).

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::ImageFiles;
use crate::sys::log_limit::limited;
use crate::sys::write_back::begin_write_back;

/// Interval between two write-backs.
const PERIOD: Duration = Duration::from_millis(100);

/// A thread that writes dirty pages of the image back until this is dropped. The drop does not wait for it, so a
/// hanging disk blocks this thread alone.
pub(crate) struct WriteBack {
    _running: Sender<()>,
}

impl WriteBack {
    /// Starts the thread.
    pub(crate) fn start(files: Arc<ImageFiles>) -> io::Result<WriteBack> {
        let (_running, ended) = bounded(0);
        thread::Builder::new().name("write back".into()).spawn(move || write_back_loop(&files, &ended))?;
        Ok(WriteBack { _running })
    }
}

fn write_back_loop(files: &ImageFiles, ended: &Receiver<()>) {
    loop {
        // The flush at the end reports errors of the write.
        if let Err(error) = begin_write_back(files.buffered.as_fd()) {
            return limited!(warn, "the image is not written back ahead of a migration's end: {error}");
        }
        match ended.recv_timeout(PERIOD) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
