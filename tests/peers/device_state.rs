//! The state of a device that QEMU migrates: a device with the name of a file system, and nothing in it but a state (rule D1).

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

    /// One for what can't wait and one for requests.
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

/// One that is served by a thread of this process.
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

    /// As the guest would, after QEMU has reset the machine.
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
    // Without it QEMU's source does not hear of what happens at the destination, and takes everything for done.
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
