//! Any bytes as the state of a device: through its pipe with a correct hash, or as the record in it. The device refuses
//! them, or saves the same state again.
//!
//! Input: pipe or record, and the bytes.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use twox_hash::XxHash3_64;
use vhost_migrate::abi::vhost_user::{
    DEVICE_STATE_LOAD, DEVICE_STATE_PHASE_STOPPED, DeviceStateTransfer, FrontendRequest as Code, ProtocolFeatures,
};
use vhost_migrate::backend::VirtioDevice;
use vhost_migrate::backend::net::{NetDevice, NetOptions, NetPeer};
use vhost_migrate::memory::sealed_memfd;
use vhost_migrate::unstable::backend::{MessageOutcome, Session, VhostUserMessage, Workers};
use zerocopy::IntoBytes;

fuzz_target!(|input: &[u8]| {
    let Some((&which, state)) = input.split_first() else { return };
    let options = NetOptions::new(NetPeer::Loopback, [2, 0, 0, 0, 0, 1]).with_pairs(3);
    let net = Arc::new(NetDevice::open(options).unwrap());
    let before = net.save_state().unwrap();
    let loaded = if which & 1 == 0 { net.load_state(state).is_ok() } else { through_a_pipe(&net, state) };
    let after = net.save_state().unwrap();
    match loaded {
        true => assert!(net.load_state(&after).is_ok()),
        false => assert_eq!(before, after, "a state that was refused has changed something"),
    }
});

/// Loads the state over a connection. Returns true if the device accepted it.
fn through_a_pipe(net: &Arc<NetDevice>, record: &[u8]) -> bool {
    let bytes = [record, &XxHash3_64::oneshot(record).to_le_bytes()].concat();
    let file = File::from(sealed_memfd("state", bytes.len() as u64).unwrap());
    file.write_all_at(&bytes, 0).unwrap();
    let device: Arc<dyn VirtioDevice> = net.clone();
    let (mut session, mut rings) = (Session::new(device.clone()), Workers::new(device));
    let mut tell = |code, payload: &[u8], fds| {
        let step =
            session.handle_message(VhostUserMessage { code, flags: 1, payload: payload.to_vec(), fds }, &mut rings);
        if let MessageOutcome::Reply(reply) = step { reply.payload.first() == Some(&0) } else { false }
    };
    tell(Code::SET_PROTOCOL_FEATURES, ProtocolFeatures::DEVICE_STATE.as_bytes(), vec![]);
    let transfer = DeviceStateTransfer { direction: DEVICE_STATE_LOAD, phase: DEVICE_STATE_PHASE_STOPPED };
    assert!(tell(Code::SET_DEVICE_STATE_FD, transfer.as_bytes(), vec![file.into()]));
    tell(Code::CHECK_DEVICE_STATE, &[], vec![])
}
