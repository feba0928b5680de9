//! A proxy between a vhost-user front-end and its back-end that can start, change and stop the back-end's logging. A test
//! then reads the log as the back-end wrote it. QEMU would clear it at a harvest, and hide missing marks of the used
//! ring.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_migrate::abi::vhost_user::{
    FrontendRequest, Header, LogDescription, MemoryHeader, MemoryRegion, ProtocolFeatures, VHOST_F_LOG_ALL,
    VHOST_VRING_F_LOG, VringAddr, VringState,
};
use vhost_migrate::abi::virtio::VirtioFeatures;
use zerocopy::{FromBytes, IntoBytes};

use crate::message::{Message, has_reply, pass_on, receive, send};
use crate::process::{DEADLINE, Lab};

/// A dirty log of the test, for the first 4 GiB of guest memory.
pub(crate) struct TestLog(File);

impl TestLog {
    const SIZE: u64 = (4 << 30) / 4096 / 8;

    pub(crate) fn new() -> TestLog {
        let file = File::from(memfd_create(c"log", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(TestLog::SIZE).unwrap();
        TestLog(file)
    }

    /// Clears all marks. No device may mark meanwhile.
    pub(crate) fn clear(&self) {
        self.0.write_all_at(&vec![0; TestLog::SIZE as usize], 0).unwrap();
    }

    /// The pages that are marked.
    pub(crate) fn pages(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; TestLog::SIZE as usize];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        let marked =
            |(at, byte): (u64, u8)| (0..8).filter(move |bit| byte >> bit & 1 != 0).map(move |bit| at * 8 + bit);
        (0..).zip(bytes).flat_map(marked).collect()
    }
}

/// A command for the proxy.
enum Order {
    /// SET_LOG_BASE with this log. With a distance in bytes also LOG_ALL and F_LOG, with log addresses moved by it.
    Log(File, Option<u64>),
    /// SET_FEATURES without LOG_ALL, and SET_VRING_ADDR without F_LOG.
    Off,
    /// SET_VRING_ENABLE of all rings.
    Enable(bool),
}

/// Features of the back-end that are hidden from the front-end, as bits.
#[derive(Clone, Copy, Default)]
pub(crate) struct Hidden {
    pub(crate) features: VirtioFeatures,
    pub(crate) protocol_features: ProtocolFeatures,
}

/// Called before the next SET_LOG_BASE of the front-end reaches the back-end.
type BeforeLog = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

/// Guest memory of the front-end's memory table.
type Memory = Arc<Mutex<Vec<(MemoryRegion, File)>>>;

pub(crate) struct Proxy {
    socket: PathBuf,
    memory: Memory,
    before_log: BeforeLog,
    orders: Sender<(Order, Sender<()>)>,
    wake: UnixStream,
}

impl Proxy {
    /// Listens beside the socket of `backend`, and serves one front-end after the other.
    pub(crate) fn start(lab: &Lab, name: &str, backend: &Path) -> Proxy {
        Proxy::hiding(lab, name, backend, Hidden::default())
    }

    /// As [`start`](Proxy::start), with features of the back-end hidden.
    pub(crate) fn hiding(lab: &Lab, name: &str, backend: &Path, hidden: Hidden) -> Proxy {
        let socket = lab.file(name);
        let listener = UnixListener::bind(&socket).unwrap();
        let (wake, woken) = UnixStream::pair().unwrap();
        let (orders, receiver) = mpsc::channel();
        let backend = backend.to_owned();
        let (memory, before_log) = (Memory::default(), BeforeLog::default());
        let (seen, held) = (memory.clone(), before_log.clone());
        thread::spawn(move || {
            for frontend in listener.incoming() {
                let Ok(backend) = UnixStream::connect(&backend) else { continue };
                let session = Session::new(frontend.unwrap(), backend, hidden, seen.clone(), held.clone());
                if session.serve(&woken, &receiver).is_none() {
                    break;
                }
            }
        });
        Proxy { socket, memory, before_log, orders, wake }
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Delays the front-end's next SET_LOG_BASE until `done` has returned.
    pub(crate) fn before_next_log(&self, done: impl FnOnce() + Send + 'static) {
        *self.before_log.lock().unwrap() = Some(Box::new(done));
    }

    /// Starts logging. The back-end has acknowledged it when this returns. The used rings are logged `moved` bytes after
    /// their addresses.
    pub(crate) fn log_on(&self, log: &TestLog, moved: u64) {
        self.order(Order::Log(log.0.try_clone().unwrap(), Some(moved)));
    }

    /// Replaces the log. The back-end no longer uses the old one when this returns.
    pub(crate) fn switch_log(&self, log: &TestLog) {
        self.order(Order::Log(log.0.try_clone().unwrap(), None));
    }

    /// Stops logging.
    pub(crate) fn log_off(&self) {
        self.order(Order::Off);
    }

    /// Disables all rings. The back-end has completed its requests and writes no more when this returns.
    pub(crate) fn disable(&self) {
        self.order(Order::Enable(false));
    }

    /// Enables all rings again.
    pub(crate) fn enable(&self) {
        self.order(Order::Enable(true));
    }

    /// Contents of guest memory: each region's first address and its bytes.
    pub(crate) fn contents(&self) -> Vec<(u64, Vec<u8>)> {
        let read = |(region, file): &(MemoryRegion, File)| {
            let mut bytes = vec![0; region.memory_size as usize];
            file.read_exact_at(&mut bytes, region.mmap_offset).unwrap();
            (region.guest_phys_addr, bytes)
        };
        self.memory.lock().unwrap().iter().map(read).collect()
    }

    fn order(&self, order: Order) {
        let (done, acknowledged) = mpsc::channel();
        self.orders.send((order, done)).unwrap();
        (&self.wake).write_all(&[1]).unwrap();
        acknowledged.recv_timeout(DEADLINE).expect("the back-end acknowledges");
    }
}

/// One front-end's connection.
struct Session {
    frontend: UnixStream,
    backend: UnixStream,
    features: VirtioFeatures,
    reply_ack: bool,
    rings: Vec<VringAddr>,
    hidden: Hidden,
    memory: Memory,
    before_log: BeforeLog,
}

impl Session {
    fn new(
        frontend: UnixStream,
        backend: UnixStream,
        hidden: Hidden,
        memory: Memory,
        before_log: BeforeLog,
    ) -> Session {
        for stream in [&frontend, &backend] {
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
        }
        Session {
            frontend,
            backend,
            features: VirtioFeatures::empty(),
            reply_ack: false,
            rings: Vec::new(),
            hidden,
            memory,
            before_log,
        }
    }

    /// Forwards messages and executes commands until one side hangs up. Returns `None` at the end of the test.
    fn serve(mut self, mut woken: &UnixStream, orders: &Receiver<(Order, Sender<()>)>) -> Option<()> {
        loop {
            let mut fds = [
                PollFd::new(self.frontend.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.backend.as_fd(), PollFlags::empty()),
                PollFd::new(woken.as_fd(), PollFlags::POLLIN),
            ];
            poll(&mut fds, PollTimeout::NONE).ok()?;
            let [from_frontend, from_backend, order] = fds.map(|fd| fd.any().unwrap_or(true));
            if order {
                woken.read_exact(&mut [0]).ok()?;
                let (order, done) = orders.recv().ok()?;
                if self.obey(&order).is_some() {
                    let _ = done.send(());
                }
            } else if from_backend || (from_frontend && self.forward().is_none()) {
                return Some(());
            }
        }
    }

    fn forward(&mut self) -> Option<()> {
        let mut message = receive(&self.frontend)?;
        match FrontendRequest(message.header.request) {
            FrontendRequest::SET_FEATURES => self.features = VirtioFeatures::read_from_bytes(&message.payload).ok()?,
            FrontendRequest::SET_PROTOCOL_FEATURES => {
                let features = ProtocolFeatures::read_from_bytes(&message.payload).ok()?;
                self.reply_ack = features.contains(ProtocolFeatures::REPLY_ACK);
                // Needed for the proxy's messages, because the front-end may not log.
                message.payload = (features | ProtocolFeatures::LOG_SHMFD).as_bytes().to_vec();
            }
            FrontendRequest::SET_VRING_ADDR => {
                let ring = VringAddr::read_from_bytes(&message.payload).ok()?;
                self.rings.retain(|known| known.index != ring.index);
                self.rings.push(ring);
            }
            FrontendRequest::SET_MEM_TABLE => *self.memory.lock().unwrap() = memory_table(&message)?,
            FrontendRequest::SET_LOG_BASE => {
                let done = self.before_log.lock().unwrap().take();
                done.into_iter().for_each(|done| done());
            }
            _ => {}
        }
        pass_on(&self.backend, &message)?;
        if !has_reply(&message.header) {
            return Some(());
        }
        let mut reply = receive(&self.backend)?;
        let hidden = match FrontendRequest(message.header.request) {
            FrontendRequest::GET_FEATURES => self.hidden.features.bits(),
            FrontendRequest::GET_PROTOCOL_FEATURES => self.hidden.protocol_features.bits(),
            _ => 0,
        };
        if hidden != 0 {
            let offered = u64::read_from_bytes(&reply.payload).ok()?;
            reply.payload = (offered & !hidden).as_bytes().to_vec();
        }
        pass_on(&self.frontend, &reply)
    }

    fn obey(&mut self, order: &Order) -> Option<()> {
        match order {
            Order::Log(log, moved) => {
                let description = LogDescription { mmap_size: TestLog::SIZE, mmap_offset: 0 };
                self.inject(FrontendRequest::SET_LOG_BASE, description.as_bytes(), &[log.as_raw_fd()])?;
                moved.map_or(Some(()), |moved| self.set_logging(Some(moved)))
            }
            Order::Off => self.set_logging(None),
            Order::Enable(on) => self.rings.clone().iter().try_for_each(|ring| {
                let state = VringState { index: ring.index, num: (*on).into() };
                self.inject(FrontendRequest::SET_VRING_ENABLE, state.as_bytes(), &[])
            }),
        }
    }

    /// The guest-physical address of the front-end's address.
    fn gpa(&self, user: u64) -> Option<u64> {
        let memory = self.memory.lock().unwrap();
        memory.iter().find_map(|(region, _)| {
            let offset = user.checked_sub(region.userspace_addr)?;
            (offset < region.memory_size).then_some(region.guest_phys_addr + offset)
        })
    }

    fn set_logging(&mut self, moved: Option<u64>) -> Option<()> {
        let mut features = self.features;
        features.set(VHOST_F_LOG_ALL, moved.is_some());
        self.inject(FrontendRequest::SET_FEATURES, features.as_bytes(), &[])?;
        for mut ring in self.rings.clone() {
            ring.flags = moved.map_or(0, |_| VHOST_VRING_F_LOG.bits());
            // User-mode Linux does not log and sends no log address.
            if ring.log_guest_addr == u64::MAX {
                ring.log_guest_addr = self.gpa(ring.used_user_addr)?;
            }
            ring.log_guest_addr += moved.unwrap_or(0);
            self.inject(FrontendRequest::SET_VRING_ADDR, ring.as_bytes(), &[])?;
        }
        Some(())
    }

    /// Sends a message of the proxy, and checks its acknowledgement (rule F4.1).
    fn inject(&mut self, request: FrontendRequest, payload: &[u8], fds: &[RawFd]) -> Option<()> {
        assert!(self.reply_ack, "the front-end has not negotiated REPLY_ACK");
        let own_reply = request == FrontendRequest::SET_LOG_BASE;
        let flags = Header::FLAG_VERSION | if own_reply { 0 } else { Header::FLAG_NEED_REPLY };
        let header = Header { request: request.0, flags, size: u32::try_from(payload.len()).ok()? };
        send(&self.backend, &Message { header, payload: payload.to_vec(), fds: fds.to_vec() })?;
        let reply = receive(&self.backend)?;
        assert_eq!((reply.header.request, reply.header.flags), (request.0, Header::REPLY_FLAGS));
        assert!(own_reply || reply.payload == [0; 8], "{request} refused");
        Some(())
    }
}

/// The regions of SET_MEM_TABLE, mapped by the proxy.
fn memory_table(message: &Message) -> Option<Vec<(MemoryRegion, File)>> {
    let regions = message.payload.get(size_of::<MemoryHeader>()..)?.chunks_exact(size_of::<MemoryRegion>());
    let with_files = regions.zip(&message.fds).map(|(bytes, fd)| {
        let file = File::options().read(true).write(true).open(format!("/proc/self/fd/{fd}"));
        Some((MemoryRegion::read_from_bytes(bytes).ok()?, file.ok()?))
    });
    with_files.collect()
}
