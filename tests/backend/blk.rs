//! The block device: requests, configuration space, image lock, options and log.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant};

use rstest::rstest;
use vhost_migrate::abi::vhost_user::{ConfigHeader, FrontendRequest as Code, ProtocolFeatures, VHOST_F_LOG_ALL};
use vhost_migrate::abi::virtio::{
    BlkConfig, BlkDiscardWriteZeroes, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_F_IN_ORDER, VIRTIO_RING_F_INDIRECT_DESC, VirtioFeatures,
};
use vhost_migrate::backend::VirtioDevice;
use vhost_migrate::backend::blk::{Aio, BlkDevice, BlkOptions};
use vhost_migrate::memory::{Address, GuestAddress, Region};
use vhost_migrate::ring::Buffer;
use zerocopy::{FromBytes, IntoBytes};

use crate::guest::{
    BASIC, Guest, HIGH, PACKED, REGION, Ring, SPLIT, add_region, header, negotiate, request_addresses, status,
};
use crate::page_cache::unwritten;
use crate::prometheus::fetch_metrics;
use crate::raw::RawFrontend;
use crate::server::{Process, Server, disk_options};

pub(crate) const DISK: u64 = 4 << 20;
/// Address of the header of a request, and the buffer of its status.
pub(crate) const HEADER: GuestAddress = GuestAddress(0x61_0000);
pub(crate) const STATUS: Buffer = Buffer { gpa: GuestAddress(0x80_0000), len: 1 };
pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// A disk, its front-end, and the guest of that front-end with one ring.
pub(crate) struct DiskGuest {
    pub(crate) server: Server,
    pub(crate) client: RawFrontend,
    pub(crate) guest: Guest,
    ring: Ring,
}

impl DiskGuest {
    pub(crate) fn new(change: impl FnOnce(&mut BlkOptions)) -> DiskGuest {
        DiskGuest::with(SPLIT, change)
    }

    fn with(features: VirtioFeatures, change: impl FnOnce(&mut BlkOptions)) -> DiskGuest {
        DiskGuest::negotiated(features | VIRTIO_BLK_F_FLUSH | VIRTIO_RING_F_INDIRECT_DESC, change)
    }

    /// Negotiates exactly these features, and starts ring 0.
    pub(crate) fn negotiated(features: VirtioFeatures, change: impl FnOnce(&mut BlkOptions)) -> DiskGuest {
        let (server, guest, client) = Server::disk(DISK, change).negotiated(features);
        let ring = Ring::started(&client, &guest, 0, 256, features);
        DiskGuest { server, client, guest, ring }
    }

    /// Submits a request with these buffers, and waits for it. Returns its status and its used length. The status is
    /// the last writable byte, or 0xff if there is none.
    pub(crate) fn request(&mut self, readable: &[Buffer], writable: &[Buffer]) -> (u8, u32) {
        let last = writable.last().map(|buffer| buffer.gpa.unchecked_add(u64::from(buffer.len) - 1));
        if let Some(last) = last {
            self.guest.memory.write(last, &[0xff]).unwrap();
        }
        self.ring.driver.add(readable, writable, None).unwrap().unwrap();
        self.ring.kick();
        let (_, len) = self.ring.completion();
        (last.map_or(0xff, |last| self.guest.bytes(last, 1)[0]), len)
    }

    pub(crate) fn simple(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, u32) {
        let (head, status, at) = request_addresses(0);
        self.guest.memory.write(at, data).unwrap();
        let mut readable = vec![header(&self.guest, head, kind, sector)];
        let mut writable = vec![];
        if !data.is_empty() {
            readable.push(Buffer { gpa: at, len: data.len() as u32 });
        }
        if room > 0 {
            writable.push(Buffer { gpa: at.unchecked_add(0x8000), len: room });
        }
        writable.push(Buffer { gpa: status, len: 1 });
        self.request(&readable, &writable)
    }

    pub(crate) fn data(&self, len: usize) -> Vec<u8> {
        self.guest.bytes(request_addresses(0).2.unchecked_add(0x8000), len)
    }

    fn on_disk(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        std::fs::File::open(self.server.image()).unwrap().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }
}

fn every_engine(promise: impl Fn(&mut DiskGuest)) {
    for (aio, direct) in [(Aio::IoUring, false), (Aio::Threads, false), (Aio::IoUring, true), (Aio::Threads, true)] {
        for features in [SPLIT, PACKED] {
            promise(&mut DiskGuest::with(features, |options| (options.aio, options.direct) = (aio, direct)));
        }
    }
}

#[test]
fn writes_reach_the_image_and_reads_return_its_contents() {
    every_engine(|blk| {
        let data: Vec<u8> = (0..8192u32).map(|i| (i % 251) as u8).collect();
        assert_eq!(blk.simple(1, 10, &data, 0), (OK, 1));
        assert_eq!(blk.on_disk(5120, 8192), data);
        assert_eq!(blk.simple(0, 10, &[], 8192), (OK, 8193));
        assert_eq!(blk.data(8192), data);
        assert_eq!(blk.simple(VIRTIO_BLK_T_FLUSH, 0, &[], 0), (OK, 1));
    });
}

#[test]
fn concurrent_requests_complete_each_with_its_own_data() {
    every_engine(|blk| {
        for slot in 0..80 {
            blk.ring.read(&blk.guest, slot, slot * 8, 4096);
        }
        blk.ring.kick();
        assert_eq!(blk.ring.completions(80).len(), 80);
        for slot in 0..80 {
            assert_eq!(status(&blk.guest, slot), OK);
            for sector in 0..8 {
                let found = blk.guest.bytes(request_addresses(slot).2.unchecked_add(sector * 512), 8);
                assert_eq!(found, (slot * 8 + sector).to_le_bytes());
            }
        }
    });
}

#[test]
fn the_split_of_a_request_into_descriptors_has_no_meaning() {
    every_engine(|blk| {
        let at = HEADER;
        header(&blk.guest, at, VIRTIO_BLK_T_OUT, 33);
        blk.guest.memory.write(at.unchecked_add(16), &[0xab; 1024]).unwrap();
        // The header is in three parts. The last part also has the first bytes of the data.
        let readable = [
            Buffer { gpa: at, len: 1 },
            Buffer { gpa: at.unchecked_add(1), len: 14 },
            Buffer { gpa: at.unchecked_add(15), len: 101 },
            Buffer { gpa: at.unchecked_add(116), len: 924 },
        ];
        assert_eq!(blk.request(&readable, &[STATUS]), (OK, 1));
        assert_eq!(blk.on_disk(33 * 512, 1024), [0xab; 1024]);
        // The data is in parts that are not whole sectors. The last part also has the status.
        let head = header(&blk.guest, at, 0, 33);
        let (data, rest) = (HIGH.unchecked_add(3), GuestAddress(0x70_0001));
        let writable = [Buffer { gpa: data, len: 1000 }, Buffer { gpa: rest, len: 25 }];
        assert_eq!(blk.request(&[head], &writable), (OK, 1025));
        assert_eq!(blk.guest.bytes(data, 1000), [0xab; 1000]);
        assert_eq!(blk.guest.bytes(rest, 24), [0xab; 24]);
    });
}

#[test]
fn a_request_with_more_segments_than_iov_max_is_transferred() {
    for (aio, features) in [(Aio::IoUring, SPLIT), (Aio::Threads, SPLIT), (Aio::IoUring, PACKED)] {
        let mut blk = DiskGuest::with(features, |options| options.aio = aio);
        // Every data buffer crosses the border between two regions.
        let border = HIGH.unchecked_add(REGION);
        let before = HIGH.unchecked_add(REGION - 256);
        let region = Region::create(border, REGION).unwrap();
        assert_eq!(add_region(&blk.client, &region), 0);
        blk.guest.memory.write(before, &[1; 256]).unwrap();
        region.slice(0, 256).unwrap().copy_from(&[2u8; 256]);
        let mut readable = vec![header(&blk.guest, HEADER, VIRTIO_BLK_T_OUT, 0)];
        readable.extend([Buffer { gpa: before, len: 512 }; 1000]);
        blk.ring.driver.add(&readable, &[STATUS], Some(GuestAddress(0x90_0000))).unwrap().unwrap();
        blk.ring.kick();
        assert_eq!(blk.ring.completion().1, 1);
        assert_eq!(blk.guest.bytes(STATUS.gpa, 1), [OK]);
        let sector = [[1; 256], [2; 256]].concat();
        assert!(blk.on_disk(0, 1000 * 512) == sector.repeat(1000));
    }
}

#[test]
fn a_request_outside_the_disk_fails_and_changes_nothing() {
    every_engine(|blk| {
        let end = DISK / 512;
        let before = blk.guest.bytes(HIGH, 0x1_0000);
        for (sector, room) in
            [(end, 512), (end - 1, 1024), (u64::MAX, 512), (u64::MAX / 512 + 1, 512), (0, 513), (0, 1)]
        {
            assert_eq!(blk.simple(0, sector, &[], room), (IOERR, 0), "{room} bytes at {sector}");
        }
        assert_eq!(blk.guest.bytes(HIGH, 0x1_0000), before);
        let image = blk.on_disk(0, DISK as usize);
        for (sector, len) in [(end, 512), (end - 1, 1024), (u64::MAX, 512), (0, 100)] {
            assert_eq!(blk.simple(1, sector, &vec![9; len], 0), (IOERR, 1));
        }
        assert_eq!(std::fs::metadata(blk.server.image()).unwrap().len(), DISK, "the image has grown");
        assert!(blk.on_disk(0, DISK as usize) == image);
        assert_eq!(blk.simple(0, end - 1, &[], 512), (OK, 513));
        assert_eq!(blk.simple(0, 0, &[], 0), (OK, 1), "nothing is a range of every disk");
    });
}

#[test]
fn a_request_without_header_or_status_does_not_stop_the_queue() {
    every_engine(|blk| {
        let head = header(&blk.guest, HEADER, VIRTIO_BLK_T_OUT, 0);
        let before = blk.on_disk(0, 512);
        let data = Buffer { gpa: HIGH, len: 512 };
        assert_eq!(blk.request(&[head, data], &[]), (0xff, 0), "no room for a status");
        assert_eq!(blk.request(&[], &[STATUS]), (IOERR, 1), "no header");
        assert_eq!(blk.request(&[Buffer { len: 15, ..head }], &[STATUS]), (IOERR, 1), "half a header");
        assert_eq!(blk.on_disk(0, 512), before);
        // Buffers outside of memory.
        let outside = Buffer { gpa: GuestAddress(1 << 40), len: 512 };
        assert_eq!(blk.request(&[head, outside], &[STATUS]), (IOERR, 1));
        let read = header(&blk.guest, HEADER, 0, 0);
        assert_eq!(blk.request(&[read], &[outside, STATUS]), (IOERR, 0));
        assert_eq!(blk.request(&[Buffer { gpa: GuestAddress(u64::MAX - 7), len: 16 }], &[STATUS]), (IOERR, 1));
        blk.ring.driver.add(&[read], &[Buffer { gpa: HIGH, len: 512 }, Buffer { len: 1, ..outside }], None).unwrap();
        blk.ring.serve_one();
        assert_eq!(blk.simple(0, 1, &[], 512), (OK, 513));
        assert_eq!(blk.data(8), 1u64.to_le_bytes());
    });
}

#[test]
fn an_unknown_request_is_unsupported() {
    let mut blk = DiskGuest::new(|_| {});
    for kind in [2, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(blk.simple(kind, 0, &[], 0), (UNSUPP, 1));
    }
}

#[test]
fn get_id_returns_the_configured_serial() {
    let mut blk = DiskGuest::new(|options| options.serial = "twenty bytes exactly".into());
    assert_eq!(blk.simple(VIRTIO_BLK_T_GET_ID, 0, &[], 20), (OK, 21));
    assert_eq!(blk.data(20), b"twenty bytes exactly");
    let mut blk = DiskGuest::new(|options| options.serial = "short".into());
    assert_eq!(blk.simple(VIRTIO_BLK_T_GET_ID, 0, &[], 20), (OK, 21));
    assert_eq!(blk.data(20), b"short\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeroes_and_other_sectors_are_unchanged() {
    every_engine(|blk| {
        let range = |sector: u64, num_sectors: u32, flags: u32| BlkDiscardWriteZeroes {
            sector: sector.into(),
            num_sectors: num_sectors.into(),
            flags: flags.into(),
        };
        let blocks = |blk: &DiskGuest| std::fs::metadata(blk.server.image()).unwrap().blocks();
        let before = blocks(blk);
        let discard = range(1024, 2048, 0);
        assert_eq!(blk.simple(VIRTIO_BLK_T_DISCARD, 0, discard.as_bytes(), 0), (OK, 1));
        assert!(blocks(blk) < before, "nothing was given back");
        for (sector, unmap) in [(4096, 0), (5120, 1)] {
            let zeroes = range(sector, 8, unmap);
            assert_eq!(blk.simple(VIRTIO_BLK_T_WRITE_ZEROES, 0, zeroes.as_bytes(), 0), (OK, 1));
            assert_eq!(blk.on_disk(sector * 512, 4096), [0; 4096]);
            assert_eq!(blk.on_disk((sector - 1) * 512, 8), (sector - 1).to_le_bytes());
            assert_eq!(blk.on_disk((sector + 8) * 512, 8), (sector + 8).to_le_bytes());
        }
        assert_eq!(std::fs::metadata(blk.server.image()).unwrap().len(), DISK);
        let end = (DISK / 512) as u32;
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(blk.simple(kind, 0, range(1, end, 0).as_bytes(), 0), (IOERR, 1));
            assert_eq!(blk.simple(kind, 0, range(0, 8, 2).as_bytes(), 0), (UNSUPP, 1));
            assert_eq!(blk.simple(kind, 0, &[0; 15], 0), (IOERR, 1));
            assert_eq!(blk.simple(kind, 0, &[0; 32], 0), (IOERR, 1), "one range at a time was offered");
        }
        let unmapped = range(0, 8, 1);
        assert_eq!(blk.simple(VIRTIO_BLK_T_DISCARD, 0, unmapped.as_bytes(), 0), (UNSUPP, 1));
    });
}

#[test]
fn a_discard_or_write_zeroes_above_the_offered_maximum_fails() {
    let mut blk = DiskGuest::new(|options| {
        std::fs::OpenOptions::new().write(true).open(&options.image).unwrap().set_len(3 << 30).unwrap();
    });
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for sectors in [(1 << 21) + 1, 5 << 20] {
            let range = BlkDiscardWriteZeroes { sector: 8.into(), num_sectors: sectors.into(), flags: 0.into() };
            assert_eq!(blk.simple(kind, 0, range.as_bytes(), 0), (IOERR, 1));
        }
        assert_eq!(blk.on_disk(8 * 512, 8), 8u64.to_le_bytes(), "a refused request has cleared something");
    }
    let range = BlkDiscardWriteZeroes { sector: 8.into(), num_sectors: (1 << 21).into(), flags: 0.into() };
    assert_eq!(blk.simple(VIRTIO_BLK_T_DISCARD, 0, range.as_bytes(), 0), (OK, 1));
    assert_eq!(blk.on_disk(8 * 512, 8), [0; 8]);
}

#[test]
fn a_read_only_disk_is_never_written() {
    let mut blk = DiskGuest::new(|options| options.read_only = true);
    let before = blk.on_disk(0, DISK as usize);
    assert_eq!(blk.simple(VIRTIO_BLK_T_OUT, 0, &[1; 512], 0), (IOERR, 1));
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        assert_eq!(blk.simple(kind, 0, &[0; 16], 0), (IOERR, 1));
    }
    assert_eq!(blk.simple(0, 0, &[], 512), (OK, 513));
    assert_eq!(blk.simple(VIRTIO_BLK_T_FLUSH, 0, &[], 0), (OK, 1));
    assert!(blk.on_disk(0, DISK as usize) == before);
}

#[test]
fn a_disk_error_completes_the_request_with_ioerr_and_the_queue_continues() {
    every_engine(|blk| {
        std::fs::OpenOptions::new().write(true).open(blk.server.image()).unwrap().set_len(1 << 20).unwrap();
        assert_eq!(blk.simple(0, 4096, &[], 4096).0, IOERR);
        // The image ends in the middle of the range. The used length counts the transferred bytes.
        assert_eq!(blk.simple(0, 2044, &[], 4096), (IOERR, 2048));
        assert_eq!(blk.simple(0, 0, &[], 512), (OK, 513));
    });
}

#[rstest]
fn queues_serve_requests_independently(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let (_server, guest, client) = Server::disk(DISK, |options| options.queues = 4).negotiated(features);
    let mut rings: Vec<_> = (0..4).map(|index| Ring::new(&guest, index, 64, features)).collect();
    for ring in &rings {
        ring.start(&client, &guest);
    }
    for (slot, ring) in (0..).zip(&mut rings) {
        ring.read(&guest, slot, slot + 100, 512);
        ring.kick();
    }
    for (slot, ring) in (0..).zip(&mut rings) {
        ring.completion();
        assert_eq!(guest.bytes(request_addresses(slot).2, 8), (slot + 100).to_le_bytes());
    }
    for ring in &rings {
        assert_eq!(client.ring_base(ring.index), ring.drained_base());
    }
}

/// Without indirect descriptors, a request takes one descriptor for each segment, one for its header and one for its
/// status.
#[test]
fn a_request_with_the_offered_maximum_of_segments_fits_the_ring() {
    for (size, segments) in [(4, 2), (64, 62), (128, 126), (256, 126), (2, 0)] {
        let server = Server::disk(DISK, |options| options.max_queue_size = size);
        let question = ConfigHeader { offset: 0, size: 72, flags: 0 };
        let answer = server.connect().request(Code::GET_CONFIG, &[question.as_bytes(), &[0; 72]].concat());
        assert_eq!(BlkConfig::read_from_bytes(&answer[12..]).unwrap().seg_max.get(), segments, "{size} entries");
    }
}

#[test]
fn configuration_space_and_features_describe_the_disk() {
    let server = Server::disk(DISK + 100, |options| options.queues = 3);
    let client = server.connect();
    let question = ConfigHeader { offset: 0, size: 72, flags: 0 };
    let answer = client.request(Code::GET_CONFIG, &[question.as_bytes(), &[0; 72]].concat());
    let config = BlkConfig::read_from_bytes(&answer[12..]).unwrap();
    assert_eq!(config.capacity.get(), DISK / 512, "a last sector that is not whole is left out");
    assert_eq!((config.blk_size.get(), config.num_queues.get(), config.seg_max.get()), (512, 3, 126));
    assert_eq!(config.max_discard_seg.get(), 1);
    let features = VirtioFeatures::from_bits_retain(client.request_u64(Code::GET_FEATURES));
    let clears = VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES;
    assert_eq!(features & (VIRTIO_BLK_F_RO | VIRTIO_BLK_F_MQ | clears), VIRTIO_BLK_F_MQ | clears);
    let folder = tempfile::tempdir().unwrap();
    let options = disk_options(folder.path(), DISK, |options| (options.read_only, options.queues) = (true, 1));
    let features = BlkDevice::open(options).unwrap().features();
    assert_eq!(features & (VIRTIO_BLK_F_RO | VIRTIO_BLK_F_MQ | clears), VIRTIO_BLK_F_RO);
}

/// Creates an image of `bytes` in the target directory. The image needs a disk and extended attributes, which the file
/// system of the directory for temporary files may not have.
fn image_on_disk(bytes: u64) -> tempfile::NamedTempFile {
    let image = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    image.as_file().set_len(bytes).unwrap();
    image
}

/// Rules G1.2 and G1.3.
#[test]
fn the_disk_generation_is_reported_while_no_ring_runs_and_changes_with_the_contents() {
    const GET_DISK_GENERATION: Code = Code(0x7664_0001);
    const GET_DISK_IDENTITY: Code = Code(0x7664_0002);
    let image = image_on_disk(DISK);
    let options = |options: &mut BlkOptions| options.image = image.path().to_owned();
    let mut blk = DiskGuest::new(options);
    let offered = ProtocolFeatures::from_bits_retain(blk.client.request_u64(Code::GET_PROTOCOL_FEATURES));
    assert_eq!(offered.bits() >> 62, 1);
    blk.client.send_body(Code::SET_PROTOCOL_FEATURES, &offered);
    let ask = |blk: &DiskGuest| blk.client.request(GET_DISK_GENERATION, &[]);
    assert!(ask(&blk).is_empty(), "a ring runs");
    let identity = blk.client.request(GET_DISK_IDENTITY, &[]);
    let base = blk.client.ring_base(0);
    let mut before = ask(&blk);
    assert_eq!((before.len(), &before), (32, &ask(&blk)));
    assert_eq!(before[..16], identity[..]);
    let other = DiskGuest::new(|options| options.share_rw = true);
    other.client.send_body(Code::SET_PROTOCOL_FEATURES, &offered);
    other.client.ring_base(0);
    assert!(ask(&other).is_empty(), "others may write it at any time");

    let range = BlkDiscardWriteZeroes { sector: 8.into(), num_sectors: 8.into(), flags: 0.into() };
    let mut base = base;
    for (kind, data, changes) in [
        (VIRTIO_BLK_T_IN, &[][..], false),
        (VIRTIO_BLK_T_FLUSH, &[], false),
        (VIRTIO_BLK_T_OUT, &[7; 512], true),
        (VIRTIO_BLK_T_DISCARD, range.as_bytes(), true),
        (VIRTIO_BLK_T_WRITE_ZEROES, range.as_bytes(), true),
    ] {
        blk.ring.set_up(&blk.client, &blk.guest, base);
        blk.ring.enable(&blk.client, true);
        for _ in 0..2 {
            assert_eq!(blk.simple(kind, 0, data, if kind == VIRTIO_BLK_T_IN { 512 } else { 0 }).0, OK);
        }
        base = blk.client.ring_base(0);
        let after = ask(&blk);
        assert_eq!((after[..16] == before[..16], after[16..] != before[16..]), (true, changes), "request {kind}");
        before = after;
    }
}

/// Deadline for write-back. It is shorter than the age at which the kernel writes data back by itself
/// (vm.dirty_expire_centisecs).
const WRITE_BACK: Duration = Duration::from_secs(15);

#[test]
fn written_data_is_written_back_while_logging_is_enabled() {
    let image = image_on_disk(DISK);
    let features = SPLIT | VIRTIO_BLK_F_FLUSH;
    let mut blk = DiskGuest::negotiated(features, |options| options.image = image.path().to_owned());
    let dirty = || unwritten(image.as_fd());
    // The second round shows that write-back continues while logging is enabled.
    for logged in [false, true] {
        for sector in (0..DISK / 512).step_by(16) {
            assert_eq!(blk.simple(VIRTIO_BLK_T_OUT, sector, &[9; 8192], 0).0, OK);
        }
        if !logged {
            assert!(dirty() > 0, "the system has written it back already: the test shows nothing");
            blk.client.send_acknowledged(Code::SET_FEATURES, &(features | VHOST_F_LOG_ALL), &[]);
        }
        let deadline = Instant::now() + WRITE_BACK;
        while dirty() > 0 {
            assert!(Instant::now() < deadline, "{} pages are left to GET_VRING_BASE", dirty());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn invalid_disk_options_are_refused_with_a_one_line_error() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("tiny"), "tiny").unwrap();
    std::fs::write(at("image"), vec![0; 4096]).unwrap();
    std::fs::write(at("file"), "no socket").unwrap();
    let cases: [(&[&str], &str); 6] = [
        (&["--image", &at("missing"), "--socket", &at("s")], "check the path"),
        (&["--image", &at("tiny"), "--socket", &at("s")], "at least 512 bytes"),
        (&["--image", folder.path().to_str().unwrap(), "--socket", &at("s"), "--read-only"], "raw image"),
        (&["--image", "/dev/null", "--socket", &at("s")], "neither a file nor a block device"),
        (&["--image", &at("image"), "--socket", &at("file")], "a file that is not a socket"),
        (&["--image", &at("image"), "--fd", "77"], "no socket that was passed on"),
    ];
    for (arguments, advice) in cases {
        let output = Process::command(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(advice) && said.lines().count() == 1, "{said}");
    }
    let output = Process::command(&["--image", &at("image")]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "wrong arguments");
}

#[test]
fn an_image_in_a_known_other_format_is_refused_unless_raw_is_requested() {
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (folder.path().join("image"), folder.path().join("s"));
    std::fs::write(&image, [b"QFI\xfb", &[0; 4092][..]].concat()).unwrap();
    let arguments = ["--image", image.to_str().unwrap(), "--socket", socket.to_str().unwrap()];
    let refused = Process::command(&arguments).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(1) && said.contains("qcow2") && said.contains("--format raw"), "{said}");
    drop(Process::start(&socket, &image, &["--format", "raw"]));
}

/// Two processes have one image in a migration within one host, or when a killed process has left I/O in the kernel. A
/// read-only disk waits for the lock too (rules I9.1, I9.2).
#[rstest]
fn a_ring_starts_only_after_another_process_unlocks_the_image(#[values(false, true)] read_only: bool) {
    let first = DiskGuest::new(|options| options.read_only = read_only);
    let image = first.server.image();
    let share = |options: &mut BlkOptions| (options.image, options.read_only) = (image.clone(), read_only);
    let (_server, guest, client) = Server::disk(DISK, share).negotiated(BASIC);
    let mut ring = Ring::new(&guest, 0, 256, BASIC);
    ring.set_up(&client, &guest, ring.initial_base());
    ring.read(&guest, 0, 5, 512);
    ring.kick();
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            ring.enable(&client, true);
            ring.completion()
        });
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(!served.is_finished(), "two back-ends use the image at once");
        first.client.ring_base(0);
        assert_eq!(served.join().unwrap().1, 513);
    });
    // A disk with `share_rw` does not wait for the lock.
    let other = DiskGuest::new(|options| (options.image, options.share_rw) = (image, true));
    drop(other);
}

#[test]
fn two_read_only_disks_with_share_readers_serve_one_image() {
    let readers = |options: &mut BlkOptions| (options.read_only, options.share_readers) = (true, true);
    let mut first = DiskGuest::new(readers);
    let image = first.server.image();
    let mut second = DiskGuest::new(|options| {
        readers(options);
        options.image = image;
    });
    for blk in [&mut first, &mut second] {
        assert_eq!(blk.simple(0, 7, &[], 512), (OK, 513));
        assert_eq!(blk.data(8), 7u64.to_le_bytes());
    }
}

#[test]
fn completions_follow_the_request_order_with_in_order() {
    for ring in [SPLIT, PACKED] {
        let (_server, guest, client) = Server::disk(DISK, |options| options.in_order = true).connected();
        let features = ring | VIRTIO_F_IN_ORDER;
        negotiate(&client, &guest, features);
        let mut ring = Ring::new(&guest, 0, 256, features);
        ring.set_up(&client, &guest, ring.drained_base());
        ring.enable(&client, true);
        for round in 0..20 {
            // Large reads. Between them are small reads and refused requests, which may complete before the large
            // reads.
            let asked: Vec<u16> = (0..30)
                .map(|slot| match slot % 3 {
                    0 => ring.read(&guest, slot, round * 100, 60 << 10),
                    1 => ring.read(&guest, slot, u64::MAX, 512),
                    _ => ring.read(&guest, slot, slot, 512),
                })
                .collect();
            ring.kick();
            for (slot, head) in (0..).zip(asked) {
                assert_eq!(ring.completion().0, head);
                assert_ne!(status(&guest, slot), 0xff, "its turn came before it was complete");
            }
        }
    }
}

/// The used length is the number of bytes, counted from the first one, that the driver may rely on (virtio 1.2, "The
/// Virtqueue Used Ring").
/// Rule R12.1.
#[rstest]
fn the_used_length_counts_bytes_written_contiguously_from_the_first(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let mut blk = DiskGuest::with(features, |_| {});
    assert_eq!(blk.simple(VIRTIO_BLK_T_GET_ID, 0, &[], 100), (OK, 20), "the serial number, and then nothing");
    assert_eq!(blk.simple(VIRTIO_BLK_T_GET_ID, 0, &[], 20), (OK, 21));
    assert_eq!(blk.simple(VIRTIO_BLK_T_FLUSH, 0, &[], 0), (OK, 1));
    assert_eq!(blk.simple(VIRTIO_BLK_T_IN, 1, &[], 512), (OK, 513));
    assert_eq!(blk.simple(VIRTIO_BLK_T_IN, 1 << 40, &[], 512), (IOERR, 0), "behind the disk's end");
    assert_eq!(blk.simple(99, 0, &[], 512), (UNSUPP, 0));
    // The image ends in the middle of the range. The used length counts the bytes that were read.
    let image = std::fs::OpenOptions::new().write(true).open(blk.server.image()).unwrap();
    image.set_len(1024).unwrap();
    assert_eq!(blk.simple(VIRTIO_BLK_T_IN, 1, &[], 1024), (IOERR, 512));
    assert_eq!(blk.simple(VIRTIO_BLK_T_IN, 4, &[], 512), (IOERR, 0));
}

/// A guest cannot fill the log. Its failed requests cause a bounded number of lines, and none of level ERROR.
#[test]
fn requests_with_unmapped_buffers_fail_and_are_counted_without_error_lines() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, image) = (folder.path().join("socket"), disk_options(folder.path(), 1 << 20, |_| {}).image);
    let metrics = folder.path().join("metrics");
    let more = ["--metrics", &format!("unix:{}", metrics.display())];
    let mut process = Process::start(&socket, &image, &more);
    let (guest, client) = (Guest::new(), RawFrontend::connect(&socket));
    negotiate(&client, &guest, SPLIT);
    let mut ring = Ring::started(&client, &guest, 0, 256, SPLIT);
    for slot in 0..200 {
        let (head, status, _) = request_addresses(slot);
        let head = header(&guest, head, VIRTIO_BLK_T_IN, 0);
        let outside = [Buffer { gpa: GuestAddress(1 << 50), len: 512 }, Buffer { gpa: status, len: 1 }];
        ring.driver.add(&[head], &outside, None).unwrap().unwrap();
        ring.kick();
        assert_eq!(ring.completion().1, 0);
        assert_eq!(crate::guest::status(&guest, slot), IOERR);
    }
    let counted = fetch_metrics(std::os::unix::net::UnixStream::connect(&metrics).unwrap());
    assert!(counted.contains("vhost_failed_requests_total{ring=\"0\"} 200"), "{counted}");
    process.child.kill().unwrap();
    let said = process.stderr();
    assert!(!said.contains("ERROR") && said.lines().count() < 60, "{said}");
}

/// A front-end cannot fill the log. Its refused messages cause a bounded number of lines.
#[test]
fn repeated_refused_messages_are_limited_in_the_log() {
    let (_folder, socket, mut process) = Process::disk(&[]);
    let client = RawFrontend::connect(&socket);
    for _ in 0..5000 {
        client.send_body(Code(4711), &0u64);
    }
    client.wait_until_processed();
    process.child.kill().unwrap();
    let said = process.stderr();
    assert!(said.contains("4711") && said.lines().count() < 1000, "{} lines", said.lines().count());
}
