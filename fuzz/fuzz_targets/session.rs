//! Any messages of a front-end in any order: no panic, and a ring is not started twice or stopped before it is started.
//!
//! Input: messages, each a request number, flags, a count of fds, a length, and the payload.
#![no_main]

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vhost_migrate::abi::vhost_user::{FrontendRequest, ProtocolFeatures, unstable};
use vhost_migrate::abi::virtio::VirtioFeatures;
use vhost_migrate::backend::{BackendError, Queue, VirtioDevice};
use vhost_migrate::memory::{Iova, sealed_memfd};
use vhost_migrate::ring::RingBase;
use vhost_migrate::unstable::backend::{
    Logging, MessageOutcome, Notifier, Session, VhostUserMessage, VringConfig, VringController,
};

struct Nothing;

impl VirtioDevice for Nothing {
    fn features(&self) -> VirtioFeatures {
        VirtioFeatures::from_bits_retain(1 << 32 | 1 << 33)
    }

    fn queues(&self) -> u16 {
        3
    }

    fn max_queue_size(&self) -> u16 {
        256
    }

    fn config(&self) -> Vec<u8> {
        vec![1; 60]
    }

    fn protocol_features(&self) -> ProtocolFeatures {
        ProtocolFeatures::PAGEFAULT | unstable::INFLIGHT_MIGRATION
    }

    fn state_kind(&self) -> Option<&'static str> {
        Some("nothing")
    }

    fn save_state(&self) -> Result<Vec<u8>, BackendError> {
        Ok(vec![7; 100])
    }

    fn load_state(&self, state: &[u8]) -> Result<(), BackendError> {
        assert_eq!(state, [7; 100], "a state that nobody saved");
        Ok(())
    }

    fn start_queue(&self, _index: u16, _size: u16, _features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Rings that only check the order of their commands.
#[derive(Default)]
struct Checked {
    running: [bool; 3],
}

impl VringController for Checked {
    fn start(&mut self, index: u16, setup: VringConfig) -> Result<(), BackendError> {
        let running = &mut self.running[usize::from(index)];
        assert!(!*running, "a running ring was started");
        assert!((1..=256).contains(&setup.layout.size()));
        let [desc, ..] = setup.layout.areas();
        assert!(setup.iotlb.is_some() || setup.memory.slice(desc, 16 * u64::from(setup.layout.size())).is_ok());
        *running = true;
        Ok(())
    }

    fn stop(&mut self, index: u16) -> Result<RingBase, BackendError> {
        let running = &mut self.running[usize::from(index)];
        assert!(std::mem::take(running), "a stopped ring was stopped");
        Ok(RingBase::split(7))
    }

    fn set_logging(&mut self, index: u16, _logging: Logging) {
        assert!(self.running[usize::from(index)]);
    }

    fn invalidate(&mut self, _iovas: &RangeInclusive<Iova>) {}

    fn kick(&mut self, index: u16) {
        assert!(self.running[usize::from(index)]);
    }

    fn set_notifiers(&mut self, index: u16, _call: Option<Arc<Notifier>>, _error: Option<Arc<Notifier>>) {
        assert!(self.running[usize::from(index)]);
    }
}

fuzz_target!(|input: &[u8]| {
    let (mut session, mut rings) = (Session::new(Arc::new(Nothing)), Checked::default());
    let Ok(file) = sealed_memfd("fuzz", 1 << 16) else { return };
    // The device state is read from the start of its file.
    let _ = File::from(file.try_clone().unwrap()).write_at(input, 0);
    let mut rest = input;
    while let Some((&[code, flags, fds, len], after)) = rest.split_first_chunk() {
        let (payload, after) = after.split_at(after.len().min(len.into()));
        rest = after;
        let fds = (0..fds % 4).filter_map(|_| file.as_fd().try_clone_to_owned().ok()).collect();
        let message = VhostUserMessage {
            code: FrontendRequest(code.into()),
            flags: flags.into(),
            payload: payload.to_vec(),
            fds,
        };
        match session.handle_message(message, &mut rings) {
            MessageOutcome::NoReply => {}
            MessageOutcome::Reply(reply) => assert_eq!(reply.to_bytes().len(), 12 + reply.payload.len()),
            MessageOutcome::Close(_) => return,
        }
    }
});
