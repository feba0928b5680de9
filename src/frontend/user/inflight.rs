//! The front-end's copy of the inflight region: an fd that is kept for the next back-end and not changed while rings
//! run. Its contents are handled by the `inflight` module (rules I1-I7).
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use super::super::{FrontendError, InflightState};
use super::connection::Reply;
use crate::abi::inflight::{PACKED_ENTRY_BYTES, PACKED_HEADER_BYTES, SPLIT_ENTRY_BYTES, SPLIT_HEADER_BYTES};
use crate::abi::vhost_user::{FrontendRequest, InflightDescription};
use crate::inflight::RingKind;

/// Excess over the needed size that is accepted, for back-ends that round up to huge pages.
const SLACK: u64 = 2 << 20;

pub(super) struct InflightFile {
    file: File,
    size: u64,
    offset: u64,
    queues: u16,
    queue_size: u16,
}

impl InflightFile {
    /// Parses a GET_INFLIGHT_FD reply and checks it against the request (rule I1.2).
    pub(super) fn from_reply(
        reply: Reply,
        queues: u16,
        queue_size: u16,
        packed: bool,
    ) -> Result<InflightFile, FrontendError> {
        let request = FrontendRequest::GET_INFLIGHT_FD;
        let breach = |what: String| FrontendError::ProtocolViolation { request, what, rule: "I1.2" };
        // Some back-ends omit the four bytes of padding at the end (rule F6.3).
        let mut bytes = [0; size_of::<InflightDescription>()];
        match (reply.payload.len(), bytes.get_mut(..reply.payload.len())) {
            (20.., Some(bytes)) => bytes.copy_from_slice(&reply.payload),
            (len, _) => return Err(breach(format!("a reply of {len} bytes instead of 24"))),
        }
        let description: InflightDescription = zerocopy::transmute!(bytes);
        let (size, offset) = (description.mmap_size, description.mmap_offset);
        let mut fds = reply.fds.into_iter();
        let (Some(fd), None) = (fds.next(), fds.next()) else {
            return Err(breach("no fd, or several".into()));
        };
        if (description.num_queues, description.queue_size) != (queues, queue_size) {
            return Err(breach(format!(
                "a region for {} queues of {} instead of {queues} of {queue_size}",
                description.num_queues, description.queue_size
            )));
        }
        let needed = ring_kind(packed).queue_bytes(queue_size) * u64::from(queues);
        if size < needed || size > needed + SLACK {
            return Err(breach(format!("a region of {size} bytes; {needed} are needed")));
        }
        let file = File::from(fd);
        let has = file.metadata().map_err(FrontendError::system("look at the inflight region"))?.len();
        if offset.checked_add(size).is_none_or(|end| end > has) {
            return Err(breach(format!("{size} bytes at offset {offset} of a file of {has} bytes")));
        }
        Ok(InflightFile { file, size, offset, queues, queue_size })
    }

    pub(super) fn description(&self) -> InflightDescription {
        InflightDescription {
            mmap_size: self.size,
            mmap_offset: self.offset,
            num_queues: self.queues,
            queue_size: self.queue_size,
            padding: [0; 4],
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn state(&self) -> Result<InflightState, FrontendError> {
        let mut contents = vec![0; self.size as usize];
        let read = self.file.read_exact_at(&mut contents, self.offset);
        read.map_err(FrontendError::system("read the inflight region"))?;
        Ok(InflightState { queues: self.queues, queue_size: self.queue_size, contents })
    }

    /// Copies the contents of another region if it has the same size. Another size is accepted if no request is in
    /// flight.
    pub(super) fn restore(&self, state: &InflightState, packed: bool) -> Result<(), FrontendError> {
        let fits = (state.queues, state.queue_size, state.contents.len() as u64);
        let own = (self.queues, self.queue_size, self.size);
        if fits != own {
            let shape = |(queues, size, bytes)| format!("{queues} queues of {size} entries in {bytes} bytes");
            return match state.requests(packed) {
                0 => Ok(()),
                requests => Err(FrontendError::InflightMismatch { requests, here: shape(own), there: shape(fits) }),
            };
        }
        let written = self.file.write_all_at(&state.contents, self.offset);
        written.map_err(FrontendError::system("restore the inflight region"))
    }

    /// Returns the number of marked requests.
    pub(super) fn marked(&self, packed: bool) -> Result<u64, FrontendError> {
        Ok(self.state()?.requests(packed))
    }
}

impl InflightState {
    /// Returns the number of marked requests of these split or packed rings.
    pub(crate) fn requests(&self, packed: bool) -> u64 {
        let (header, entry) = match packed {
            true => (PACKED_HEADER_BYTES, PACKED_ENTRY_BYTES),
            false => (SPLIT_HEADER_BYTES, SPLIT_ENTRY_BYTES),
        };
        let entries = usize::from(self.queue_size);
        let queues =
            self.contents.chunks(ring_kind(packed).queue_bytes(self.queue_size) as usize).take(self.queues.into());
        let marks = queues
            .flat_map(|queue| queue.get(header as usize..).unwrap_or_default().chunks(entry as usize).take(entries));
        marks.filter(|entry| entry.first() == Some(&1)).count() as u64
    }
}

fn ring_kind(packed: bool) -> RingKind {
    if packed { RingKind::Packed } else { RingKind::Split }
}
