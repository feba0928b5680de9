//! A back-end with arbitrary replies: the client returns an error or continues, within its timeouts and without leaks.
//!
//! Input: features, the reply to each request, and messages on the back-end channel.
#![no_main]

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, Header, InflightDescription, ProtocolFeatures};
use vhost_migrate::abi::virtio::{VIRTIO_F_RING_PACKED, VirtioFeatures};
use vhost_migrate::dirty::Log;
use vhost_migrate::frontend::{Device, Iommu, Mapping, RingSetup, UserDevice, UserOptions};
use vhost_migrate::inflight;
use vhost_migrate::memory::{Access, GuestAddress, Iova, Memory, Region, sealed_memfd};
use vhost_migrate::ring::RingBase;
use zerocopy::{FromZeros, IntoBytes};

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());
/// Timeout of the client.
const TIMEOUT: Duration = Duration::from_millis(5);

/// Back-end side of the input.
struct HostileBackend<'a> {
    input: &'a [u8],
    features: VirtioFeatures,
    /// The back-end channel, if the front-end has sent one.
    channel: Option<UnixStream>,
}

impl HostileBackend<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.input.split_first() else { return 0 };
        self.input = rest;
        first
    }

    /// Serves one connection until either side closes it.
    fn serve(&mut self, socket: &UnixStream) {
        while let Some((header, fd)) = receive(socket) {
            let mut payload = vec![0; header.size as usize];
            if (&*socket).read_exact(&mut payload).is_err() {
                break;
            }
            if header.request == Code::SET_BACKEND_REQ_FD.0 {
                self.channel = fd.map(UnixStream::from);
                self.channel.iter().for_each(|channel| channel.set_nonblocking(true).unwrap());
            }
            self.send_channel_messages();
            if !self.reply(socket, header, &payload) {
                break;
            }
        }
        self.channel = None;
    }

    /// Sends messages on the back-end channel, and leaves replies unread at times.
    fn send_channel_messages(&mut self) {
        if self.channel.is_none() {
            return;
        }
        let how = self.byte();
        for _ in 0..how & 3 {
            let request = u32::from(self.byte() % 12);
            let body: Vec<u8> = (0..self.byte() % 64).map(|_| self.byte()).collect();
            let (mut flags, mut size) = (1 | u32::from(how & 8), body.len() as u32);
            if how & 0x30 == 0x30 {
                (flags, size) = (flags ^ u32::from(self.byte()), size ^ 1 << (self.byte() % 32));
            }
            let message = [Header { request, flags, size }.as_bytes(), &body].concat();
            let Some(channel) = &mut self.channel else { return };
            let _ = channel.write(&message);
            if how & 4 != 0 {
                let _ = channel.read(&mut [0; 64]);
            }
        }
    }

    fn reply(&mut self, socket: &UnixStream, asked: Header, payload: &[u8]) -> bool {
        let how = self.byte();
        let code = Code(asked.request);
        let mut fd: Option<OwnedFd> = None;
        let own = match code {
            Code::GET_FEATURES => Some(self.features.as_bytes().to_vec()),
            Code::GET_PROTOCOL_FEATURES => Some(u64::MAX.as_bytes().to_vec()),
            Code::GET_QUEUE_NUM => Some(2u64.as_bytes().to_vec()),
            Code::GET_MAX_MEM_SLOTS => Some(16u64.as_bytes().to_vec()),
            Code::GET_STATUS => Some(7u64.as_bytes().to_vec()),
            Code::SET_LOG_BASE | Code::GET_VRING_BASE | Code::GET_CONFIG => Some(payload.to_vec()),
            Code::GET_INFLIGHT_FD => {
                let kind = if self.features.contains(VIRTIO_F_RING_PACKED) {
                    inflight::RingKind::Packed
                } else {
                    inflight::RingKind::Split
                };
                let (_, region) = inflight::InflightRegion::create(kind, 2, 64).unwrap();
                fd = Some(region);
                let mmap_size = inflight::InflightRegion::bytes_for(kind, 2, 64).unwrap();
                let answer =
                    InflightDescription { mmap_size, mmap_offset: 0, num_queues: 2, queue_size: 64, padding: [0; 4] };
                Some(answer.as_bytes().to_vec())
            }
            _ => (asked.flags & Header::FLAG_NEED_REPLY != 0).then(|| 0u64.as_bytes().to_vec()),
        };
        let mut reply = match own {
            Some(reply) if how < 0xf8 => reply,
            Some(_) | None if how < 0x80 => return true,
            _ => (0..self.byte()).map(|_| self.byte()).collect(),
        };
        let mut header = Header { request: asked.request, flags: 5, size: reply.len() as u32 };
        match how & 0x0f {
            1 => header.flags = self.byte().into(),
            2 => header.request = self.byte().into(),
            3 => header.size ^= 1 << (self.byte() % 32),
            4 => return false,
            5 | 6 | 7 => {
                let (at, bits) = (usize::from(self.byte()), self.byte());
                if let Some(byte) = reply.get_mut(at) {
                    *byte ^= bits;
                }
            }
            8 => reply.truncate(self.byte().into()),
            9 => fd = Some(EventFd::new().unwrap().into()),
            10 => fd = sealed_memfd("small", self.byte().into()).ok(),
            11 => fd = None,
            12 => header.size = reply.len() as u32 / 2,
            _ => {}
        }
        let bytes = [header.as_bytes(), &reply].concat();
        let copies = if how == 0x49 { 20 } else { 1 };
        let raw: Vec<_> = fd.iter().cycle().take(copies).map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None).is_ok()
    }
}

/// Receives the header of a request, and its fd.
fn receive(socket: &UnixStream) -> Option<(Header, Option<OwnedFd>)> {
    let (mut header, mut fd) = (Header::new_zeroed(), None);
    let mut space = nix::cmsg_space!([RawFd; 8]);
    let mut slices = [IoSliceMut::new(header.as_mut_bytes())];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut space), flags).ok()?;
    for message in received.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(fds) = message {
            // SAFETY: recvmsg has just created these fds, and nothing else owns them.
            fd = fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).last();
        }
    }
    (received.bytes == size_of::<Header>()).then_some((header, fd))
}

/// Maps all memory to itself except one page.
struct Identity;

impl Iommu for Identity {
    fn translate(&self, iova: Iova, _: Access) -> Option<Mapping> {
        let page = iova.0 & !0xfff;
        let (iova, gpa) = (Iova(page), GuestAddress(page));
        (page != 0x3000).then_some(Mapping { iova, size: 0x1000, gpa, permission: Access::ReadWrite })
    }
}

/// Uses a device as a VMM does. Errors are as good as success.
fn drive(path: PathBuf, features: VirtioFeatures, in_band: bool, memory: &Memory) {
    let usual = UserOptions::default();
    let more = if in_band { ProtocolFeatures::INBAND_NOTIFICATIONS } else { ProtocolFeatures::empty() };
    let protocol_features = usual.protocol_features | more;
    let options = usual.with_timeout(TIMEOUT).with_stop_timeout(TIMEOUT).with_protocol_features(protocol_features);
    let Ok(mut device) = UserDevice::connect(path, options, Instant::now()) else { return };
    device.set_iommu(Arc::new(Identity));
    let _ = device.set_features(features & device.features());
    let _ = device.set_inflight(2, 64, None);
    let state = device.inflight_state();
    let _ = device.set_memory(memory);
    let _ = (device.config(0, &mut [0; 60]), device.status(), device.set_status(15));
    let eventfd = || Arc::new(OwnedFd::from(EventFd::new().unwrap()));
    let base = RingBase::initial(device.acked_features());
    for index in 0..2 {
        let at = u64::from(index) * 0x1000;
        let ([desc, avail, used], kick, call) = ([at, at + 0x400, at + 0x800].map(GuestAddress), eventfd(), eventfd());
        let setup = RingSetup { size: 64, desc, avail, used, kick, call, error: None, base };
        let _ = device.start_ring(index, setup);
    }
    let (log, fd) = Log::create(memory.end()).unwrap();
    let _ = device.start_logging(&Arc::new(log), fd.as_fd());
    let _ = (device.invalidate(Iova(0)..=Iova(0x1fff)), device.stop_ring(0), device.take_events());
    if device.needs_reconnect() {
        let _ = device.reconnect(Instant::now());
    }
    let _ = (device.stop_logging(), device.stop_ring(1), device.inflight_state());
    if let Ok(Some(state)) = state {
        let _ = device.set_inflight(2, 64, Some(&state));
    }
}

fuzz_target!(|input: &[u8]| {
    let Some((&features, input)) = input.split_first() else { return };
    let (in_band, iommu) = (features & 8 != 0, u64::from(features >> 4 & 1) << 33);
    let features = iommu | 1 << 32 | 1 << 30 | 1 << 26 | u64::from(features & 1) << 34 | u64::from(features & 6) << 27;
    let features = VirtioFeatures::from_bits_retain(features);
    let path = FOLDER.path().join("socket");
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = count();
    {
        let listener = UnixListener::bind(&path).unwrap();
        let memory = sealed_memfd("guest", 0x4000)
            .and_then(|fd| Ok(Region::share(fd, GuestAddress(0), 0x4000, 0).unwrap()))
            .unwrap();
        let memory = Memory::new([Arc::new(memory)]).unwrap();
        std::thread::scope(|scope| {
            let (at, memory) = (path.clone(), &memory);
            let driving = scope.spawn(move || drive(at, features, in_band, memory));
            let mut backend = HostileBackend { input, features, channel: None };
            listener.set_nonblocking(true).unwrap();
            while !driving.is_finished() {
                match listener.accept() {
                    Ok((socket, _)) => {
                        socket.set_nonblocking(false).unwrap();
                        backend.serve(&socket);
                    }
                    Err(_) => std::thread::sleep(Duration::from_micros(50)),
                }
            }
            driving.join().unwrap();
        });
    }
    std::fs::remove_file(&path).unwrap();
    assert_eq!(count(), before, "file descriptors");
});
