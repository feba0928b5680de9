//! A disk whose queues write to the log, the inflight region and the channel.

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use vhost_migrate::abi::inflight::{SPLIT_HEADER_BYTES, SplitEntry};
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, ProtocolFeatures};
use vhost_migrate::abi::virtio::{BlkConfig, BlkRequestHeader, VirtioFeatures};
use vhost_migrate::backend::blk::BlkDevice;
use vhost_migrate::backend::{BackendError, FrontendHandle, Queue, Request, VirtioDevice};
use vhost_migrate::unstable::backend::VhostUserMessage;

use crate::backend_channel::{ChannelFault, ChannelSocket};
use crate::fault::Fault;
use crate::forward::forward;
use crate::iommu::IommuFault;

/// Offset of the pages above 4 GiB in the log, and the number of bytes written back.
const HIGH: (u64, usize) = ((1 << 32) / 4096 / 8, 320);
/// Size of a large block, and its offset in configuration space.
const LARGE: u64 = 4096;
const BLOCK_SIZE_AT: usize = offset_of!(BlkConfig, blk_size);
/// Number of times for each completed batch.
const TURNS: u32 = 100;
/// Time that a word is held before it is written back.
const HELD: Duration = Duration::from_micros(50);
/// Delay of a request.
const LONG: Duration = Duration::from_millis(50);

/// Files that the front-end has shared.
#[derive(Default)]
pub(crate) struct SharedFiles {
    log: Mutex<Option<File>>,
    region: Mutex<Option<Region>>,
    channel: Mutex<Option<ChannelSocket>>,
}

impl SharedFiles {
    /// Drops the files of the last front-end.
    pub(crate) fn forget(&self) {
        *self.log.lock().unwrap() = None;
        *self.region.lock().unwrap() = None;
        *self.channel.lock().unwrap() = None;
    }

    /// Records the file that a message shares.
    pub(crate) fn note(&self, message: &VhostUserMessage) {
        let fd = || Some(message.fds.first()?.try_clone().unwrap());
        let file = || fd().map(File::from);
        match message.code {
            Code::SET_LOG_BASE => *self.log.lock().unwrap() = file(),
            Code::SET_INFLIGHT_FD => *self.region.lock().unwrap() = file().map(Region),
            Code::SET_BACKEND_REQ_FD => *self.channel.lock().unwrap() = fd().map(ChannelSocket::new),
            _ => {}
        }
    }

    /// Calls `with` with the inflight region, if there is one.
    pub(crate) fn region<T>(&self, with: impl FnOnce(&Region) -> T) -> Option<T> {
        self.region.lock().unwrap().as_ref().map(with)
    }

    /// Calls `with` with the channel, if there is one.
    pub(crate) fn channel<T>(&self, with: impl FnOnce(&ChannelSocket) -> T) -> Option<T> {
        self.channel.lock().unwrap().as_ref().map(with)
    }
}

pub(crate) struct FaultyDisk {
    pub(crate) disk: BlkDevice,
    pub(crate) fault: Fault,
    pub(crate) files: Arc<SharedFiles>,
}

impl VirtioDevice for FaultyDisk {
    forward!(disk: features -> VirtioFeatures, queues -> u16, max_queue_size -> u16, protocol_features -> ProtocolFeatures);

    fn config(&self) -> Vec<u8> {
        let mut config = self.disk.config();
        if self.fault == Fault::LargeBlocks {
            config[BLOCK_SIZE_AT..][..4].copy_from_slice(&(LARGE as u32).to_le_bytes());
        }
        config
    }

    fn set_config(&self, offset: u32, bytes: &[u8], flags: u32) -> Result<(), BackendError> {
        self.disk.set_config(offset, bytes, flags)
    }

    fn connected(&self, host: Arc<FrontendHandle>) {
        self.disk.connected(host);
    }

    fn start_queue(&self, index: u16, size: u16, features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        let queue = self.disk.start_queue(index, size, features)?;
        Ok(Box::new(FaultyQueue { queue, fault: self.fault, files: self.files.clone() }))
    }
}

struct FaultyQueue {
    queue: Box<dyn Queue>,
    fault: Fault,
    files: Arc<SharedFiles>,
}

impl Queue for FaultyQueue {
    forward!(queue: completion_fd -> Option<BorrowedFd<'_>>);

    fn wants_request(&mut self) -> bool {
        self.queue.wants_request()
    }

    fn submit(&mut self, request: Request) {
        if self.fault == Fault::Iommu(IommuFault::InvalidatesTooEarly) {
            // Its translations may be invalidated meanwhile.
            thread::sleep(LONG);
        }
        if self.fault == Fault::LargeBlocks {
            let head: BlkRequestHeader = request.read_obj(0).unwrap();
            let data = (request.readable_len() - size_of_val(&head) as u64) + (request.writable_len() - 1);
            assert_eq!((head.sector.get() * 512 % LARGE, data % LARGE), (0, 0), "not a whole block");
        }
        self.queue.submit(request);
    }

    fn completions(&mut self, done: &mut Vec<Request>) {
        self.queue.completions(done);
        if done.is_empty() {
            return;
        }
        match self.fault {
            Fault::KeepsCountersZero => {
                self.files.region(Region::forget_counters);
            }
            Fault::BackendChannel(ChannelFault::BlocksOnFullChannel) => {
                self.files.channel(ChannelSocket::call);
            }
            Fault::WritesBackStaleMarks => {
                if let Some(log) = &*self.files.log.lock().unwrap() {
                    write_back(log);
                }
            }
            _ => {}
        }
    }

    fn put_back(&mut self, unused: &mut Vec<Request>) {
        self.queue.put_back(unused);
    }

    fn suspend(&mut self, unserved: &mut Vec<Request>) {
        self.queue.suspend(unserved);
    }
}

/// Repeatedly reads a part of the log and writes it back a moment later.
fn write_back(log: &File) {
    let (at, len) = HIGH;
    let mut words = vec![0; len];
    for _ in 0..TURNS {
        if log.read_exact_at(&mut words, at).is_ok() {
            thread::sleep(HELD);
            let _ = log.write_all_at(&words, at);
        }
    }
}

/// Inflight region of a split ring, as a file.
pub(crate) struct Region(pub(crate) File);

impl Region {
    pub(crate) fn header(&self) -> [u8; SPLIT_HEADER_BYTES as usize] {
        let mut header = [0; SPLIT_HEADER_BYTES as usize];
        self.0.read_exact_at(&mut header, 0).unwrap();
        header
    }

    /// Returns true if it begins with feature bits, which are not defined.
    pub(crate) fn is_noise(&self) -> bool {
        self.header()[..8] != [0; 8]
    }

    /// Returns true if it was never used.
    pub(crate) fn is_fresh(&self) -> bool {
        self.header()[8..10] == [0; 2]
    }

    /// Sets all counters to 0.
    fn forget_counters(&self) {
        let entries = (self.0.metadata().unwrap().len() - SPLIT_HEADER_BYTES) / size_of::<SplitEntry>() as u64;
        for entry in 0..entries.min(256) {
            self.0.write_all_at(&[0; 8], SPLIT_HEADER_BYTES + 16 * entry + 8).unwrap();
        }
    }
}
