//! A front-end and a guest that execute the fuzzer's input on real devices with real workers.
//!
//! Guest memory is two regions of one file, with unmapped pages between and around them. Half of the inputs are *tame*:
//! their descriptors ask for writes to one part of memory only, and all other memory must stay unchanged, however wrong
//! indexes, chains and requests are. After each input, no page outside the memory table has changed, and there are as
//! many threads and fds as before.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost_migrate::abi::vhost::{VHOST_IOTLB_INVALIDATE, VHOST_IOTLB_UPDATE};
use vhost_migrate::abi::vhost_user::{
    FrontendRequest as Code, Header, InflightDescription, IotlbMsg, LogDescription, MemoryHeader, MemoryRegion,
    VringAddr, VringState,
};
use vhost_migrate::backend::VirtioDevice;
use vhost_migrate::backend::blk::{Aio, BlkDevice, BlkOptions};
use vhost_migrate::backend::net::{NetDevice, NetOptions, NetPeer};
use vhost_migrate::inflight;
use vhost_migrate::memory::{GuestAddress, Memory, Region, UserAddress, sealed_memfd};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

const PAGE: u64 = 4096;
/// Pages of the file: one, 16 of the low region, one, 2 of the high region, one.
const FILE: u64 = 21 * PAGE;
const LOW: (u64, u64) = (PAGE, 16 * PAGE);
const HIGH: (u64, u64) = (18 * PAGE, 2 * PAGE);
const HIGH_GPA: u64 = 1 << 32;
const LOW_USER: u64 = 0x10_0000_0000;
const HIGH_USER: u64 = 0x20_0000_0000;
/// Parts of the low region: rings (a page each), headers, indirect tables, and the buffers of a tame guest.
const HEADERS: u64 = 0x4000;
const TABLES: u64 = 0x5000;
const BUFFERS: u64 = 0x8000;
const SIZE: u16 = 64;
const PATTERN: u8 = 0xa5;
const LOG: u64 = (HIGH_GPA / PAGE + 16) / 8;

const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const PACKED: u64 = 1 << 34;
const IOMMU: u64 = 1 << 33;

/// The receiver of messages. `send` returns false when the session has ended.
pub trait Link {
    fn send(&mut self, input: &mut Input<'_>, code: Code, flags: u32, payload: &[u8], fds: Vec<OwnedFd>) -> bool;
}

/// The rest of the input. Zeros follow its end.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    fn long(&mut self) -> u64 {
        let bytes: [u8; 8] = std::array::from_fn(|_| self.byte());
        u64::from_le_bytes(bytes)
    }
}

static DISKS: LazyLock<[Arc<dyn VirtioDevice>; 2]> = LazyLock::new(|| {
    let disk = |aio| {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(16 * PAGE).unwrap();
        let options = BlkOptions::new(file.path())
            .with_queues(2)
            .with_max_queue_size(SIZE)
            .with_aio(aio)
            .with_in_order(true)
            .with_inflight_migration(true)
            .with_iommu(true);
        Arc::new(BlkDevice::open(options).unwrap()) as Arc<dyn VirtioDevice>
    };
    [disk(Aio::IoUring), disk(Aio::Threads)]
});

/// The device that the first byte names.
pub fn device(which: u8) -> Arc<dyn VirtioDevice> {
    match which % 4 {
        0 | 1 => DISKS[0].clone(),
        2 => DISKS[1].clone(),
        _ => {
            let mac = [0x52, 0x54, 0, 0, 0, 1];
            let options = NetOptions::new(NetPeer::Loopback, mac).with_max_queue_size(SIZE).with_iommu(true);
            Arc::new(NetDevice::open(options).unwrap())
        }
    }
}

/// The numbers of fds and threads of this process.
fn open_fds_and_threads() -> (usize, usize) {
    let count = |of: &str| std::fs::read_dir(of).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

/// Runs `session` and checks that it leaves no fd and no thread.
pub fn check_for_leaks(session: impl FnOnce()) {
    let before = open_fds_and_threads();
    session();
    // The kernel lists a joined thread for a moment longer.
    for _ in 0..10_000 {
        if open_fds_and_threads() == before {
            return;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    assert_eq!(open_fds_and_threads(), before, "file descriptors and threads");
}

/// The guest and its memory, and the fds of its front-end.
pub struct Guest {
    file: OwnedFd,
    memory: Memory,
    log: OwnedFd,
    inflight: (OwnedFd, u64),
    kicks: [EventFd; 3],
    /// The back-end channel, after SET_BACKEND_REQ_FD.
    channel: Option<UnixStream>,
    tame: bool,
    /// The bytes of headers and tables that the guest has written.
    shadow: Vec<u8>,
    features: u64,
    avail: [u16; 3],
    queues: u16,
}

impl Guest {
    pub fn new(device: &dyn VirtioDevice, bits: u8) -> Guest {
        let file = sealed_memfd("fuzz", FILE).unwrap();
        let region = Region::map(file.as_fd(), GuestAddress(0), FILE, UserAddress(0), 0).unwrap();
        let memory = Memory::new([Arc::new(region)]).unwrap();
        memory.write(GuestAddress(0), &[PATTERN; FILE as usize]).unwrap();
        memory.write(GuestAddress(LOW.0), &[0; LOW.1 as usize]).unwrap();
        let packed = if bits & 1 != 0 { PACKED } else { 0 };
        let features = 1 << 32 | 1 << 30 | packed | u64::from(bits >> 2 & 3) << 28 | u64::from(bits >> 4 & 1) << 35;
        let iommu = if bits & 0x20 != 0 { IOMMU } else { 0 };
        let features = (features | iommu) & (device.features().bits() | 1 << 30);
        let kind = if features & PACKED != 0 { inflight::RingKind::Packed } else { inflight::RingKind::Split };
        let size = inflight::InflightRegion::bytes_for(kind, 2, SIZE).unwrap();
        let (_, region) = inflight::InflightRegion::create(kind, 2, SIZE).unwrap();
        Guest {
            file,
            memory,
            log: sealed_memfd("log", LOG).unwrap(),
            inflight: (region, size),
            kicks: std::array::from_fn(|_| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap()),
            channel: None,
            tame: bits & 2 != 0,
            shadow: vec![0; (BUFFERS - HEADERS) as usize],
            features,
            avail: [0; 3],
            queues: device.queues(),
        }
    }

    /// Executes the input until it or the session ends.
    pub fn run(&mut self, input: &mut Input<'_>, link: &mut dyn Link) {
        let first = input.byte();
        let start = first & 0x80 == 0;
        if start && !(self.begin(input, link, first) && (0..2).all(|ring| self.ring(input, link, ring))) {
            return;
        }
        while !input.0.is_empty() && self.step(input, link) {}
    }

    /// Checks guest memory after the last device has stopped.
    pub fn check(&self) {
        let mut all = vec![0; FILE as usize];
        self.memory.read(GuestAddress(0), &mut all).unwrap();
        let is_untouched =
            |from: u64, len: u64| all[from as usize..(from + len) as usize].iter().all(|byte| *byte == PATTERN);
        assert!(is_untouched(0, PAGE) && is_untouched(17 * PAGE, PAGE) && is_untouched(20 * PAGE, PAGE));
        if self.tame {
            assert!(is_untouched(HIGH.0, HIGH.1), "memory that no descriptor let the device write");
            let at = (LOW.0 + HEADERS) as usize;
            assert!(all[at..at + self.shadow.len()] == self.shadow, "headers and tables are only read");
        }
    }

    fn begin(&mut self, input: &mut Input<'_>, link: &mut dyn Link, bits: u8) -> bool {
        self.tell(input, link, Code::SET_PROTOCOL_FEATURES, &(1u64 << 3 | 1 | 2 | 1 << 9 | 1 << 12 | 1 << 15), vec![])
            && (bits & 1 == 0 || self.set_inflight(input, link))
            && (self.features & IOMMU == 0 || self.set_channel(input, link))
            && self.tell(input, link, Code::SET_FEATURES, &self.features.clone(), vec![])
            && self.set_memory(input, link, 0)
            && (self.features & IOMMU == 0
                || (0..3).all(|what| bits & 2 << what != 0 || self.translate(input, link, what)))
    }

    fn set_channel(&mut self, input: &mut Input<'_>, link: &mut dyn Link) -> bool {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        self.channel = Some(ours);
        self.tell(input, link, Code::SET_BACKEND_REQ_FD, &[0u8; 0], vec![theirs.into()])
    }

    /// Replies to the requests on the back-end channel, correctly or not.
    fn answer(&self, input: &mut Input<'_>) -> bool {
        let (Some(mut channel), how) = (self.channel.as_ref(), input.byte()) else { return true };
        let mut heard = [0; 4096];
        let Ok(count) = channel.read(&mut heard) else { return true };
        let mut heard = &heard[..count];
        while let Ok((header, rest)) = Header::read_from_prefix(heard) {
            let answer = Header { request: header.request, flags: 5, size: 8 };
            let mut bytes = [answer.as_bytes(), &u64::from(how & 1).to_le_bytes()].concat();
            if how >= 0xf0 {
                bytes[usize::from(input.byte()) % 20] ^= input.byte();
            }
            if header.flags & Header::FLAG_NEED_REPLY != 0 || how & 2 != 0 {
                let _ = channel.write(&bytes);
            }
            heard = rest.get(header.size as usize..).unwrap_or_default();
        }
        true
    }

    /// Sends a translation: of the whole low region at guest-physical or front-end addresses, of the high region, of a
    /// page of the low one, or of any addresses.
    fn translate(&self, input: &mut Input<'_>, link: &mut dyn Link, what: u8) -> bool {
        let (iova, size, uaddr) = match what % 8 {
            0 => (0, LOW.1, LOW_USER),
            1 => (LOW_USER, LOW.1, LOW_USER),
            2 => (HIGH_GPA, HIGH.1, HIGH_USER),
            3 if !self.tame => (input.long(), input.long(), input.long()),
            4 if !self.tame => {
                (u64::from(input.byte()) * 256, u64::from(input.word()), LOW_USER + u64::from(input.word()))
            }
            _ => {
                let page = u64::from(input.byte() % 16) * PAGE;
                (page, PAGE, LOW_USER + page)
            }
        };
        let perm = if what >= 0xf0 { what & 7 } else { 3 };
        let message = IotlbMsg { iova, size, uaddr, perm, kind: VHOST_IOTLB_UPDATE, ..IotlbMsg::new_zeroed() };
        self.tell(input, link, Code::IOTLB_MSG, &message, vec![])
    }

    fn invalidate(&self, input: &mut Input<'_>, link: &mut dyn Link) -> bool {
        let (what, page) = (input.byte(), u64::from(input.byte() % 20) * PAGE);
        let (iova, size) = match what % 4 {
            0 => (0, 0),
            1 => (LOW_USER + page, PAGE),
            2 => (input.long(), input.long()),
            _ => (page, PAGE * u64::from(what >> 4)),
        };
        let message = IotlbMsg { iova, size, kind: VHOST_IOTLB_INVALIDATE, ..IotlbMsg::new_zeroed() };
        self.tell(input, link, Code::IOTLB_MSG, &message, vec![])
    }

    fn tell(
        &self,
        input: &mut Input<'_>,
        link: &mut dyn Link,
        code: Code,
        body: &(impl IntoBytes + zerocopy::Immutable + ?Sized),
        fds: Vec<OwnedFd>,
    ) -> bool {
        link.send(input, code, 9, body.as_bytes(), fds)
    }

    fn set_memory(&self, input: &mut Input<'_>, link: &mut dyn Link, wrong: u8) -> bool {
        let mut regions = [
            MemoryRegion { guest_phys_addr: 0, memory_size: LOW.1, userspace_addr: LOW_USER, mmap_offset: LOW.0 },
            MemoryRegion {
                guest_phys_addr: HIGH_GPA,
                memory_size: HIGH.1,
                userspace_addr: HIGH_USER,
                mmap_offset: HIGH.0,
            },
        ];
        if wrong & 0xf0 != 0 {
            // Wrong fields, but no valid region outside the guest's part of the file.
            match wrong & 3 {
                0 => regions[1].guest_phys_addr = input.long(),
                1 => regions[1].userspace_addr = input.long(),
                2 => regions[1].memory_size = u64::from(input.word()) % (HIGH.1 + 1),
                _ => regions[0].memory_size = input.long() | 1 << 40,
            }
        }
        let count = if wrong & 0xc == 4 { 1 } else { 2 };
        let mut payload = MemoryHeader { nregions: count, padding: 0 }.as_bytes().to_vec();
        payload.extend(regions[..count as usize].as_bytes());
        let fds = (0..count).map(|_| self.file.try_clone().unwrap()).collect();
        self.tell(input, link, Code::SET_MEM_TABLE, payload.as_slice(), fds)
    }

    fn set_inflight(&self, input: &mut Input<'_>, link: &mut dyn Link) -> bool {
        let (fd, mmap_size) = (self.inflight.0.try_clone().unwrap(), self.inflight.1);
        let description =
            InflightDescription { mmap_size, mmap_offset: 0, num_queues: 2, queue_size: SIZE, padding: [0; 4] };
        self.tell(input, link, Code::SET_INFLIGHT_FD, &description, vec![fd])
    }

    fn addr(&self, ring: u32, flags: u32) -> VringAddr {
        let at = LOW_USER + u64::from(ring) * PAGE;
        VringAddr {
            index: ring,
            flags,
            desc_user_addr: at,
            avail_user_addr: at + 0x400,
            used_user_addr: at + 0x800,
            log_guest_addr: u64::from(ring) * PAGE + 0x800,
        }
    }

    /// Sends all messages that start a ring.
    fn ring(&mut self, input: &mut Input<'_>, link: &mut dyn Link, ring: u32) -> bool {
        let bits = input.byte();
        let size = if bits & 0xf == 0xf { u32::from(input.word()) } else { 1 << (bits % 7) };
        let base = if bits & 0x10 != 0 { input.word() } else { 0 };
        let num = if self.features & PACKED != 0 && bits & 0x20 == 0 { 0x8000_8000 } else { u32::from(base) };
        self.avail[ring as usize % 3] = num as u16;
        let state = |num| VringState { index: ring, num };
        let kick = self.kicks[ring as usize % 3].as_fd().try_clone_to_owned().unwrap();
        let call = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap().into();
        self.tell(input, link, Code::SET_VRING_CALL, &u64::from(ring), vec![call])
            && self.tell(input, link, Code::SET_VRING_NUM, &state(size), vec![])
            && self.tell(input, link, Code::SET_VRING_BASE, &state(num), vec![])
            && self.tell(input, link, Code::SET_VRING_ADDR, &self.addr(ring, u32::from(bits >> 6 & 1)), vec![])
            && self.tell(input, link, Code::SET_VRING_KICK, &u64::from(ring), vec![kick])
            && self.tell(input, link, Code::SET_VRING_ENABLE, &state(1), vec![])
    }

    fn step(&mut self, input: &mut Input<'_>, link: &mut dyn Link) -> bool {
        let ring = u32::from(input.byte());
        let op = ring >> 3;
        let ring = (ring & 7) % (u32::from(self.queues) + 1);
        match op {
            0 if !self.tame => self.raw(input, link),
            1 => {
                let wrong = if self.tame { input.byte() & 0xf } else { input.byte() };
                self.set_memory(input, link, wrong)
            }
            2 => self.ring(input, link, ring),
            3 => {
                let state = VringState { index: ring, num: u32::from(input.byte() & 1) };
                self.tell(input, link, Code::SET_VRING_ENABLE, &state, vec![])
            }
            4 | 5 => self.tell(input, link, Code::GET_VRING_BASE, &VringState { index: ring, num: 0 }, vec![]),
            6 => {
                let description = LogDescription { mmap_size: LOG - u64::from(input.byte()), mmap_offset: 0 };
                let log = self.log.try_clone().unwrap();
                self.tell(input, link, Code::SET_LOG_BASE, &description, vec![log])
                    && self.tell(input, link, Code::SET_FEATURES, &(self.features | 1 << 26), vec![])
                    && self.tell(input, link, Code::SET_VRING_ADDR, &self.addr(ring, 1), vec![])
            }
            7 => {
                let kind = if self.tame { 0 } else { u64::from(input.byte()) << 32 };
                let bits = u64::from(input.byte()) << 26 & !PACKED | kind;
                self.tell(input, link, Code::SET_FEATURES, &(self.features ^ bits), vec![])
            }
            8 => self.set_inflight(input, link),
            9 if !self.tame => {
                let at = u64::from(input.word()) % self.inflight.1;
                let bytes: Vec<u8> = (0..input.byte() % 32).map(|_| input.byte()).collect();
                let file = File::from(self.inflight.0.try_clone().unwrap());
                let _ = std::os::unix::fs::FileExt::write_at(&file, &bytes, at);
                true
            }
            10 => {
                let code = [Code::RESET_DEVICE, Code::RESET_OWNER][usize::from(input.byte() & 1)];
                self.tell(input, link, code, &[0u8; 0], vec![])
            }
            11 if !self.tame => {
                let at = u64::from(input.word()) % (LOW.1 - 64);
                let bytes: Vec<u8> = (0..input.byte() % 64).map(|_| input.byte()).collect();
                self.put(at, &bytes)
            }
            12 => {
                std::thread::sleep(Duration::from_micros(u64::from(input.byte())));
                true
            }
            13 => {
                let table = TABLES + u64::from(input.byte()) * 16;
                self.descs(input, table)
            }
            14 => {
                let at = u64::from(ring) * PAGE + u64::from(input.byte() % 64) * 16;
                self.descs(input, at)
            }
            15 => {
                let [to, value] = [input.byte(), input.byte()];
                self.put(u64::from(ring) * PAGE + 0x400 + u64::from(to & 0x7f) * 2, &u16::from(value).to_le_bytes())
            }
            18 => {
                let what = input.byte();
                self.translate(input, link, what)
            }
            19 => self.invalidate(input, link),
            20 => self.set_channel(input, link),
            21 | 22 => self.answer(input),
            16 => self.publish(input, ring, 1 + u16::from(input.0.first().copied().unwrap_or(0) % 8)),
            _ => self.request(input, ring),
        }
    }

    /// Sends any message with any fds.
    fn raw(&self, input: &mut Input<'_>, link: &mut dyn Link) -> bool {
        let (code, flags, len, fds) = (input.byte(), input.byte(), input.byte(), input.byte());
        let payload: Vec<u8> = (0..len).map(|_| input.byte()).collect();
        let fds = (0..fds % 5).map(|_| self.any_fd(input.byte())).collect();
        link.send(input, Code(u32::from(code) % 50), u32::from(flags) & 8 | 1, &payload, fds)
    }

    fn any_fd(&self, kind: u8) -> OwnedFd {
        match kind % 10 {
            0 => self.log.try_clone().unwrap(),
            1 => self.inflight.0.try_clone().unwrap(),
            2 => EventFd::new().unwrap().into(),
            3 => self.kicks[0].as_fd().try_clone_to_owned().unwrap(),
            4 => nix::unistd::pipe().unwrap().0,
            5 => nix::unistd::pipe().unwrap().1,
            6 => UnixStream::pair().unwrap().0.into(),
            7 => File::open("/dev/null").unwrap().into(),
            8 => File::open("/").unwrap().into(),
            _ => sealed_memfd("small", PAGE).unwrap(),
        }
    }

    /// Writes into the low region.
    fn put(&mut self, at: u64, bytes: &[u8]) -> bool {
        if at + bytes.len() as u64 > LOW.1 {
            return true;
        }
        self.memory.write(GuestAddress(LOW.0 + at), bytes).unwrap();
        for (at, byte) in (at..).zip(bytes) {
            if let Some(place) = at.checked_sub(HEADERS).and_then(|at| self.shadow.get_mut(at as usize)) {
                *place = *byte;
            }
        }
        true
    }

    /// Writes a descriptor of either kind of ring, in the limits of a tame guest.
    fn desc(&mut self, at: u64, addr: u64, len: u32, flags: u16, next: u16) -> bool {
        let (mut addr, mut len, mut flags, mut next) = (addr, len, flags, next);
        if self.tame {
            // Each place has descriptors of one kind only, because the device may read it while it changes. The
            // position of the flags depends on the kind of ring.
            let forbidden = match at / 16 % 4 {
                0 if at < TABLES => {
                    addr = TABLES + addr % (BUFFERS - TABLES) / 16 * 16;
                    len = len.min((BUFFERS - addr) as u32);
                    WRITE
                }
                0 | 1 => WRITE | INDIRECT,
                _ => {
                    addr = BUFFERS + addr % (LOW.1 - BUFFERS);
                    len = len.min((LOW.1 - addr) as u32);
                    INDIRECT
                }
            };
            (flags, next) = (flags & !forbidden, next & !forbidden);
        }
        let bytes = [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        self.put(at, &bytes)
    }

    /// Writes descriptors with the fields of the input.
    fn descs(&mut self, input: &mut Input<'_>, at: u64) -> bool {
        for number in 0..u64::from(input.byte() % 8) {
            let [place, page, len, flags, next] = std::array::from_fn(|_| input.byte());
            let addr = match place % 8 {
                0 => HIGH_GPA + u64::from(page) * 64,
                1 => TABLES + u64::from(page) * 16,
                2 => HEADERS + u64::from(page) * 16,
                3 => input.long(),
                _ => BUFFERS + u64::from(page) * 128,
            };
            let len = if len & 0x80 == 0 { u32::from(len) * 16 } else { u32::from(len) << (len % 25) };
            // Bits 7 and 15 of the flags make a packed descriptor available.
            let flags = u16::from(flags & 7) | u16::from(flags >> 6 & 1) << 7 | u16::from(flags >> 7) << 15;
            let next = u16::from(next);
            let packed = self.features & PACKED != 0;
            let (first, second) = if packed { (next, flags) } else { (flags & 7, next % (SIZE + 1)) };
            if at % PAGE + number * 16 < 0x400 || at >= TABLES {
                self.desc(at + number * 16, addr, len, first, second);
            }
        }
        true
    }

    /// Moves the available index of a split ring, and kicks.
    fn publish(&mut self, input: &mut Input<'_>, ring: u32, ahead: u16) -> bool {
        let _ = input.byte();
        let Some(avail) = self.avail.get_mut(ring as usize) else { return true };
        *avail = avail.wrapping_add(ahead);
        let index = *avail;
        if self.features & PACKED == 0 {
            self.put(u64::from(ring) * PAGE + 0x402, &index.to_le_bytes());
        }
        self.kicks[ring as usize].write(1).unwrap();
        true
    }

    /// Adds a valid request: a header, data and a byte for the status, in this order.
    fn request(&mut self, input: &mut Input<'_>, ring: u32) -> bool {
        let [kind, sector, len, at, head] = std::array::from_fn(|_| input.byte());
        let kind = [0u32, 1, 4, 8, 11, 13, 0, 1][usize::from(kind % 8)];
        let header = HEADERS + u64::from(head % 32) * 32;
        let mut bytes = [&kind.to_le_bytes()[..], &[0; 4], &u64::from(sector).to_le_bytes(), &[0; 16]].concat();
        bytes[16] = sector;
        bytes[24] = len;
        self.put(header, &bytes);
        let data = BUFFERS + u64::from(at) * 64;
        let long = 512 * u32::from(len % 4 + 1);
        let to_guest = if matches!(kind, 0 | 8) { WRITE } else { 0 };
        let header_len = if matches!(kind, 11 | 13) { 32 } else { 16 };
        let slot = u16::from(head) % (SIZE / 4) * 4 + 1;
        let desc = u64::from(ring) * PAGE + u64::from(slot) * 16;
        if self.features & PACKED != 0 {
            let marks = if head & 0x80 != 0 { 1 << 15 } else { 1 << 7 };
            self.desc(desc + 32, BUFFERS + 0x7000 + u64::from(slot), 1, slot, WRITE | marks);
            self.desc(desc + 16, data, long, slot, to_guest | 1 | marks);
            self.desc(desc, header, header_len, slot, 1 | marks);
        } else {
            self.desc(desc, header, header_len, 1, slot + 1);
            self.desc(desc + 16, data, long, to_guest | 1, slot + 2);
            self.desc(desc + 32, BUFFERS + 0x7000 + u64::from(slot), 1, WRITE, 0);
            let index = self.avail.get(ring as usize).copied().unwrap_or(0);
            self.put(u64::from(ring) * PAGE + 0x404 + u64::from(index % SIZE) * 2, &slot.to_le_bytes());
        }
        self.publish(input, ring, 1)
    }
}
