//! A disk with an image file, made of rust-vmm's crates: `vhost-user-backend` for the protocol and `virtio-queue` for the
//! rings, used as in their documentation.
//! `cargo run --features vhost-user-backend --example rust_vmm_disk -- SOCKET IMAGE [logged]`
//!
//! Tests drive, migrate, kill and check it as a device of another project. `docs/check.md` lists the rules that it breaks.
//! With `logged`, its memory has this project's bitmap instead of the crates'. It then keeps the rules of the dirty log that
//! a device under `vhost-user-backend` can keep: the device only passes features and memory to a [`DeviceLog`]. The
//! example `file_disk.rs` keeps all rules.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures as Transport};
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::dirty::{DeviceLog, RegionBitmap};
use vhost_user_backend::bitmap::{BitmapMmapRegion, BitmapReplace};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex, VringT};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::bitmap::{BitmapSlice, NewBitmap};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap, Le32, Le64};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

/// Guest memory whose bitmap `B` leads to the front-end's log, as soon as there is one.
type Ram<B> = GuestMemoryMmap<B>;
type Memory<B> = GuestMemoryAtomic<Ram<B>>;

/// A bitmap for guest memory, and what has to be passed on to its log.
trait Logged: BitmapReplace + NewBitmap + Clone + Send + Sync + 'static {
    type Log: Default + Send + Sync + 'static;

    fn features(log: &Self::Log, features: u64);
    fn memory(log: &Self::Log, memory: &Ram<Self>);
}

impl Logged for BitmapMmapRegion {
    type Log = ();

    fn features(_: &(), _: u64) {}
    fn memory(_: &(), _: &Ram<Self>) {}
}

impl Logged for RegionBitmap {
    type Log = DeviceLog;

    fn features(log: &DeviceLog, features: u64) {
        log.acked_features(VirtioFeatures::from_bits_retain(features));
    }

    fn memory(log: &DeviceLog, memory: &Ram<Self>) {
        log.update_memory(memory);
    }
}

const QUEUES: u16 = 2;
const SECTOR: u64 = 512;

struct Disk<B: Logged> {
    image: File,
    memory: Memory<B>,
    log: B::Log,
}

impl<B: Logged> Disk<B> {
    fn bytes(&self) -> u64 {
        self.image.metadata().map_or(0, |metadata| metadata.len())
    }

    /// Serves one request. Returns the number of bytes written.
    fn serve(
        &self,
        memory: &Ram<B>,
        chain: DescriptorChain<GuestMemoryLoadGuard<Ram<B>>>,
    ) -> Result<u32, Box<dyn Error>> {
        let (mut reader, mut writer) = (chain.clone().reader(memory)?, chain.writer(memory)?);
        let mut status = writer.split_at(writer.available_bytes().saturating_sub(1))?;
        let done = self.transfer(&mut reader, &mut writer);
        status.write_obj(if done.is_ok() { VIRTIO_BLK_S_OK } else { VIRTIO_BLK_S_IOERR } as u8)?;
        Ok((writer.bytes_written() + status.bytes_written()) as u32)
    }

    fn transfer<S: BitmapSlice>(&self, reader: &mut Reader<S>, writer: &mut Writer<S>) -> io::Result<()> {
        let (kind, _, sector): (Le32, Le32, Le64) = (reader.read_obj()?, reader.read_obj()?, reader.read_obj()?);
        let len = reader.available_bytes() + writer.available_bytes();
        let at = u64::from(sector).checked_mul(SECTOR).ok_or(io::ErrorKind::InvalidInput)?;
        if at.checked_add(len as u64).is_none_or(|end| end > self.bytes()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut bytes = vec![0; len];
        match u32::from(kind) {
            VIRTIO_BLK_T_IN => {
                self.image.read_exact_at(&mut bytes, at)?;
                writer.write_all(&bytes)
            }
            VIRTIO_BLK_T_OUT => {
                reader.read_exact(&mut bytes)?;
                self.image.write_all_at(&bytes, at)
            }
            VIRTIO_BLK_T_FLUSH => self.image.sync_data(),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl<B: Logged> VhostUserBackend for Disk<B> {
    type Bitmap = B;
    type Vring = VringMutex<Memory<B>>;

    fn num_queues(&self) -> usize {
        QUEUES.into()
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        (0..QUEUES).map(|queue| 1 << queue).collect()
    }

    fn features(&self) -> u64 {
        let bits = [
            VIRTIO_F_VERSION_1,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        let transport = Transport::LOG_ALL | Transport::PROTOCOL_FEATURES;
        bits.into_iter().fold(transport.bits(), |all, bit| all | 1 << bit)
    }

    fn protocol_features(&self) -> Protocol {
        Protocol::MQ
            | Protocol::LOG_SHMFD
            | Protocol::REPLY_ACK
            | Protocol::CONFIG
            | Protocol::RESET_DEVICE
            | Protocol::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _enabled: bool) {} // the queue knows

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = [0; size_of::<virtio_blk_config>()];
        config[..8].copy_from_slice(&(self.bytes() / SECTOR).to_le_bytes());
        let queues = std::mem::offset_of!(virtio_blk_config, num_queues);
        config[queues..][..2].copy_from_slice(&QUEUES.to_le_bytes());
        let part = config.iter().chain(std::iter::repeat(&0)).skip(offset as usize);
        part.take(size as usize).copied().collect()
    }

    fn acked_features(&self, features: u64) {
        B::features(&self.log, features);
    }

    fn update_memory(&self, memory: Memory<B>) -> io::Result<()> {
        // It is the memory of the daemon, with another table.
        B::memory(&self.log, &memory.memory());
        Ok(())
    }

    fn handle_event(&self, queue: u16, _: EventSet, vrings: &[Self::Vring], _thread: usize) -> io::Result<()> {
        let memory = self.memory.memory();
        // The lock is held until the ring is empty, so GET_VRING_BASE waits for that.
        let Some(mut vring) = vrings.get(usize::from(queue)).map(VringT::get_mut) else { return Ok(()) };
        // The event may have been sent before the ring was stopped.
        while vring.is_enabled() && vring.get_queue().ready() {
            vring.disable_notification().map_err(io::Error::other)?;
            while let Some(chain) = vring.get_queue_mut().iter(memory.clone()).map_err(io::Error::other)?.next() {
                let head = chain.head_index();
                let written = self.serve(&memory, chain).unwrap_or(0);
                vring.add_used(head, written).map_err(io::Error::other)?;
                if vring.needs_notification().map_err(io::Error::other)? {
                    vring.signal_used_queue()?;
                }
            }
            if !vring.enable_notification().map_err(io::Error::other)? {
                break;
            }
        }
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::CLOEXEC).ok()
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [socket, image] => serve::<BitmapMmapRegion>(socket, image),
        [socket, image, "logged"] => serve::<RegionBitmap>(socket, image),
        _ => Err("usage: rust_vmm_disk SOCKET IMAGE [logged]".into()),
    }
}

fn serve<B: Logged>(socket: &str, image: &str) -> Result<(), Box<dyn Error>> {
    let mut listener = Listener::new(socket, true)?;
    loop {
        // A daemon serves one connection and keeps its state, so the next front-end gets a new daemon.
        let image = File::options().read(true).write(true).open(image)?;
        let memory = Memory::<B>::new(Ram::new());
        let disk = Arc::new(Disk { image, memory: memory.clone(), log: B::Log::default() });
        let mut daemon = VhostUserDaemon::new("disk".into(), disk, memory).map_err(|error| error.to_string())?;
        daemon.start(&mut listener).map_err(|error| error.to_string())?;
        if let Err(error) = daemon.wait() {
            eprintln!("{error}");
        }
    }
}
