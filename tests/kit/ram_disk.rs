//! A disk in the memory of this process that implements `Device`, with injectable faults.

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost_migrate::abi::virtio;
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::dirty::Log;
use vhost_migrate::frontend::{Device, FrontendError, InflightState, Reconnection, RingSetup};
use vhost_migrate::memory::Memory;
use vhost_migrate::ring::{Chain, DeviceRing, RingBase, RingLayout};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

/// Injected faults, each for a number of requests.
#[derive(Default)]
pub(crate) struct Faults {
    pub(crate) complete_twice: AtomicU32,
    pub(crate) answer_ioerr: AtomicU32,
    pub(crate) forget: AtomicU32,
    pub(crate) lose_write: AtomicU32,
    /// Rings that were kicked after their start.
    pub(crate) kicked: AtomicU32,
    /// The barrier at which all disks of a guest wait for each other.
    pub(crate) barrier: Barrier,
}

/// Makes calls return only once all disks have been called.
#[derive(Default)]
pub(crate) struct Barrier {
    /// Number of disks that the barrier waits for; 0 for no wait.
    pub(crate) disks: AtomicU32,
    /// Number of disks that have arrived, by call.
    here: Mutex<BTreeMap<&'static str, u32>>,
    came: Condvar,
}

impl Barrier {
    fn wait_for_all(&self, call: &'static str) -> Result<(), FrontendError> {
        let disks = self.disks.load(Ordering::Relaxed);
        let mut here = self.here.lock().unwrap();
        *here.entry(call).or_default() += 1;
        self.came.notify_all();
        let all = |here: &mut BTreeMap<&str, u32>| here[call] < disks;
        let (here, waited) = self.came.wait_timeout_while(here, Duration::from_secs(60), all).unwrap();
        drop(here);
        match waited.timed_out() {
            true => {
                Err(FrontendError::InvalidRing { index: 0, reason: "the other disks were not called meanwhile".into() })
            }
            false => Ok(()),
        }
    }
}

pub(crate) struct RamDisk {
    pub(crate) bytes: Arc<Mutex<Vec<u8>>>,
    pub(crate) faults: Arc<Faults>,
    features: VirtioFeatures,
    memory: Memory,
    queues: Vec<Option<Queue>>,
}

struct Queue {
    stop: Arc<AtomicBool>,
    kick: Arc<OwnedFd>,
    worker: JoinHandle<RingBase>,
}

impl RamDisk {
    pub(crate) fn new(bytes: &Arc<Mutex<Vec<u8>>>, faults: &Arc<Faults>) -> Box<RamDisk> {
        let queues = (0..4).map(|_| None).collect();
        Box::new(RamDisk {
            bytes: bytes.clone(),
            faults: faults.clone(),
            features: VirtioFeatures::empty(),
            memory: Memory::default(),
            queues,
        })
    }
}

fn take_one(fault: &AtomicU32) -> bool {
    fault.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

fn serve(
    mut ring: DeviceRing,
    memory: &Memory,
    setup: &RingSetup,
    bytes: &Mutex<Vec<u8>>,
    faults: &Faults,
    stop: &AtomicBool,
) -> RingBase {
    let mut chain = Chain::default();
    let wait = || {
        let mut ready = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(&setup.kick), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut ready, nix::poll::PollTimeout::NONE).unwrap();
        let _ = nix::unistd::read(&setup.kick, &mut [0; 8]);
    };
    wait();
    faults.kicked.fetch_add(1, Ordering::Relaxed);
    loop {
        loop {
            match ring.pop(&mut chain) {
                Ok(true) => {}
                Ok(false) => break,
                // An injected fault has broken the ring.
                Err(_) => return ring.base(),
            }
            let status = *chain.writable.last().unwrap();
            let mut header = [0; 16];
            memory.read(chain.readable[0].gpa, &mut header).unwrap();
            let header = virtio::BlkRequestHeader::read_from_bytes(&header).unwrap();
            let mut at = header.sector.get() as usize * 512;
            let mut disk = bytes.lock().unwrap();
            let (kind, mut written) = (header.request_type.get(), 1);
            if kind == virtio::VIRTIO_BLK_T_OUT && !take_one(&faults.lose_write) {
                for buffer in &chain.readable[1..] {
                    memory.read(buffer.gpa, &mut disk[at..at + buffer.len as usize]).unwrap();
                    at += buffer.len as usize;
                }
            }
            if kind == virtio::VIRTIO_BLK_T_IN {
                for buffer in &chain.writable[..chain.writable.len() - 1] {
                    memory.write(buffer.gpa, &disk[at..at + buffer.len as usize]).unwrap();
                    at += buffer.len as usize;
                    written += buffer.len;
                }
            }
            drop(disk);
            memory.write(status.gpa, &[u8::from(take_one(&faults.answer_ioerr))]).unwrap();
            if take_one(&faults.forget) {
                continue;
            }
            ring.push(&chain, written);
            if take_one(&faults.complete_twice) {
                ring.push(&chain, written);
            }
            if ring.publish() {
                nix::unistd::write(&setup.call, &1u64.to_ne_bytes()).unwrap();
            }
        }
        if ring.enable_notifications() {
            continue;
        }
        if stop.load(Ordering::Acquire) {
            return ring.base();
        }
        wait();
    }
}

impl Device for RamDisk {
    fn name(&self) -> &str {
        "ram disk"
    }

    fn features(&self) -> VirtioFeatures {
        [
            virtio::VIRTIO_F_VERSION_1,
            virtio::VIRTIO_F_RING_PACKED,
            virtio::VIRTIO_RING_F_EVENT_IDX,
            virtio::VIRTIO_RING_F_INDIRECT_DESC,
            virtio::VIRTIO_BLK_F_SEG_MAX,
            virtio::VIRTIO_BLK_F_FLUSH,
        ]
        .into_iter()
        .collect()
    }

    fn acked_features(&self) -> VirtioFeatures {
        self.features
    }

    fn set_features(&mut self, features: VirtioFeatures) -> Result<(), FrontendError> {
        self.features = features;
        Ok(())
    }

    fn queues(&self) -> u16 {
        self.queues.len() as u16
    }

    fn max_mem_slots(&self) -> usize {
        8
    }

    fn set_memory(&mut self, memory: &Memory) -> Result<(), FrontendError> {
        self.faults.barrier.wait_for_all("set_memory")?;
        self.memory = memory.clone();
        Ok(())
    }

    fn set_inflight(&mut self, _: u16, _: u16, _: Option<&InflightState>) -> Result<bool, FrontendError> {
        Ok(false)
    }

    fn inflight_state(&self) -> Result<Option<InflightState>, FrontendError> {
        Ok(None)
    }

    fn validate_ring(&mut self, index: u16, _: &RingSetup) -> Result<(), FrontendError> {
        if index == 0 { self.faults.barrier.wait_for_all("validate_ring") } else { Ok(()) }
    }

    fn save_state(&mut self) -> Result<Option<Vec<u8>>, FrontendError> {
        self.faults.barrier.wait_for_all("save_state").map(|()| None)
    }

    fn start_ring(&mut self, index: u16, setup: RingSetup) -> Result<(), FrontendError> {
        if index == 0 {
            self.faults.barrier.wait_for_all("start_ring")?;
        }
        let layout = RingLayout::new(self.features, setup.size, [setup.desc, setup.avail, setup.used]);
        let ring = DeviceRing::new(&self.memory, layout, self.features, setup.base).unwrap();
        let (memory, bytes, faults) = (self.memory.clone(), self.bytes.clone(), self.faults.clone());
        let (stop, kick) = (Arc::new(AtomicBool::new(false)), setup.kick.clone());
        let stopped = stop.clone();
        // Some back-ends read the kick before the message that enables the ring.
        let _ = nix::unistd::read(&setup.kick, &mut [0; 8]);
        let worker = std::thread::spawn(move || serve(ring, &memory, &setup, &bytes, &faults, &stopped));
        self.queues[usize::from(index)] = Some(Queue { stop, kick, worker });
        Ok(())
    }

    fn stop_ring(&mut self, index: u16) -> Result<RingBase, FrontendError> {
        if index == 0 {
            self.faults.barrier.wait_for_all("stop_ring")?;
        }
        let queue = self.queues[usize::from(index)].take().unwrap();
        queue.stop.store(true, Ordering::Release);
        nix::unistd::write(&queue.kick, &1u64.to_ne_bytes()).unwrap();
        Ok(queue.worker.join().unwrap())
    }

    fn start_logging(&mut self, _: &Arc<Log>, _: BorrowedFd<'_>) -> Result<(), FrontendError> {
        Ok(())
    }

    fn stop_logging(&mut self) -> Result<(), FrontendError> {
        Ok(())
    }

    fn log(&self) -> Option<&Arc<Log>> {
        None
    }

    fn config(&mut self, offset: u32, buf: &mut [u8]) -> Result<(), FrontendError> {
        let mut config = virtio::BlkConfig::new_zeroed();
        config.capacity.set(self.bytes.lock().unwrap().len() as u64 / 512);
        config.seg_max.set(4);
        buf.copy_from_slice(&config.as_bytes()[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn set_config(&mut self, _: u32, _: &[u8]) -> Result<(), FrontendError> {
        Ok(())
    }

    fn status(&mut self) -> Result<Option<u8>, FrontendError> {
        Ok(None)
    }

    fn set_status(&mut self, _: u8) -> Result<(), FrontendError> {
        Ok(())
    }

    fn hang_up_fd(&self) -> Result<Option<OwnedFd>, FrontendError> {
        Ok(None)
    }

    fn needs_reconnect(&self) -> bool {
        false
    }

    fn reconnect(&mut self, _: Instant) -> Result<Reconnection, FrontendError> {
        Ok(Reconnection::default())
    }
}

impl Drop for RamDisk {
    fn drop(&mut self) {
        for index in 0..self.queues() {
            if self.queues[usize::from(index)].is_some() {
                let _ = self.stop_ring(index);
            }
        }
    }
}
