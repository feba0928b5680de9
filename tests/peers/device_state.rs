//! Migration of a device state by QEMU (rule D1). The device has the type of a file system and contains nothing but a
//! state.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::json;
use vhost_migrate::abi::virtio::{VIRTIO_F_VERSION_1, VirtioFeatures};
use vhost_migrate::backend::{BackendError, Queue, VirtioDevice};

use crate::migration::{self, GENTLE};
use crate::process::{Lab, wait_for};
use crate::qemu::Qemu;
use crate::served::Served;

struct FileSystem {
    kind: &'static str,
    state: Mutex<Vec<u8>>,
}

impl VirtioDevice for FileSystem {
    fn features(&self) -> VirtioFeatures {
        VIRTIO_F_VERSION_1
    }

    /// Returns 2: the high-priority queue and one request queue.
    fn queues(&self) -> u16 {
        2
    }

    fn max_queue_size(&self) -> u16 {
        256
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn state_kind(&self) -> Option<&'static str> {
        Some(self.kind)
    }

    fn save_state(&self) -> Result<Vec<u8>, BackendError> {
        Ok(self.state.lock().unwrap().clone())
    }

    fn load_state(&self, state: &[u8]) -> Result<(), BackendError> {
        *self.state.lock().unwrap() = state.to_vec();
        Ok(())
    }

    fn reset(&self) {
        self.state.lock().unwrap().clear();
    }

    fn start_queue(&self, _: u16, _: u16, _: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        Err(io::Error::other("nobody uses it"))
    }
}

/// A back-end of the device, served by a thread of this process.
struct Backend {
    device: Arc<FileSystem>,
    socket: PathBuf,
    _served: Served,
}

impl Backend {
    fn new(lab: &Lab, name: &str, kind: &'static str) -> Backend {
        let device = Arc::new(FileSystem { kind, state: Mutex::default() });
        let socket = lab.file(name);
        let served = Served::new(&socket, device.clone());
        Backend { device, socket, _served: served }
    }

    /// Sets the state in place of the guest. Call it after QEMU has reset the machine.
    fn set_state(&self, state: &[u8]) {
        *self.device.state.lock().unwrap() = state.to_vec();
    }

    fn state(&self) -> Vec<u8> {
        self.device.state.lock().unwrap().clone()
    }

    fn qemu(&self, lab: &Lab, name: &str, more: &str) -> Qemu {
        let socket = self.socket.display();
        let device = format!("-chardev socket,id=vu,path={socket} -device vhost-user-fs-pci,chardev=vu,tag=t {more}");
        Qemu::guest_free_with(lab, name, &device)
    }
}

const INCOMING: &str = "-S -incoming defer";

#[test]
fn qemu_moves_the_state_of_a_device_and_every_byte_arrives() {
    let lab = Lab::new();
    let state: Vec<u8> = (0..3 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let (a, b) = (Backend::new(&lab, "a", "fs"), Backend::new(&lab, "b", "fs"));
    let (mut source, mut destination) = (a.qemu(&lab, "host-0", ""), b.qemu(&lab, "host-1", INCOMING));
    a.set_state(&state);
    migration::begin(&mut source, &mut destination, &lab.file("migration"), false, GENTLE);
    migration::let_converge(&mut source);
    migration::finish(&mut source, &mut destination);
    assert!(b.state() == state, "{} bytes arrived of {}", b.state().len(), state.len());
}

#[test]
fn a_state_that_the_destination_refuses_fails_qemus_migration_and_the_source_runs_on() {
    let lab = Lab::new();
    let (a, b) = (Backend::new(&lab, "a", "fs"), Backend::new(&lab, "b", "another"));
    let (mut source, mut destination) = (a.qemu(&lab, "host-0", ""), b.qemu(&lab, "host-1", INCOMING));
    a.set_state(b"state");
    b.set_state(b"own");
    // Without `return-path` the destination's result is not reported to the source QEMU, which then considers the
    // migration complete.
    let return_path = json!({"capabilities": [{"capability": "return-path", "state": true}]});
    for side in [&mut source, &mut destination] {
        side.qmp("migrate-set-capabilities", return_path.clone());
    }
    migration::begin(&mut source, &mut destination, &lab.file("migration"), false, GENTLE);
    migration::let_converge(&mut source);
    wait_for("the migration fails", || {
        let info = source.qmp("query-migrate", json!({}));
        assert_ne!(info["status"], "completed");
        (info["status"] == "failed").then_some(())
    });
    wait_for("the source runs on", || (source.qmp("query-status", json!({}))["status"] == "running").then_some(()));
    assert_eq!((a.state(), b.state()), (b"state".to_vec(), b"own".to_vec()));
}
