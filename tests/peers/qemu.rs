//! QEMU as a process: command lines, the firmware that only halts, and the QMP client.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::backend::words;
use crate::process::{DEADLINE, Lab, Process, wait_for};
use crate::qtest::Qtest;
use crate::ram::{Ram, SIZE};

/// The properties of the disk that QEMU presents.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disk {
    pub(crate) queues: u16,
    pub(crate) queue_size: u16,
    pub(crate) packed: bool,
}

/// A running QEMU with its QMP connection.
pub(crate) struct Qemu {
    pub(crate) name: String,
    process: Process,
    qmp: BufReader<UnixStream>,
    folder: PathBuf,
}

impl Qemu {
    /// Starts a QEMU without a guest, as the source of a migration. Its vCPU halts at once, and the test drives the
    /// devices through qtest.
    pub(crate) fn guest_free(lab: &Lab, name: &str, socket: &Path, disk: Disk) -> Qemu {
        Qemu::start(lab, name, &guest_free_arguments(lab, name, socket, disk))
    }

    /// Starts the same machine as a destination. It waits for a migration and then for `cont`.
    pub(crate) fn guest_free_destination(lab: &Lab, name: &str, socket: &Path, disk: Disk) -> Qemu {
        Qemu::start(lab, name, &(guest_free_arguments(lab, name, socket, disk) + " -S -incoming defer"))
    }

    /// Starts the machine of [`Qemu::guest_free`] with other devices, or with any other arguments.
    pub(crate) fn guest_free_with(lab: &Lab, name: &str, devices: &str) -> Qemu {
        Qemu::start(lab, name, &machine_arguments(lab, name, devices))
    }

    /// Starts QEMU with `arguments` and negotiates capabilities on its QMP socket.
    pub(crate) fn start(lab: &Lab, name: &str, arguments: &str) -> Qemu {
        let socket = lab.file(&format!("{name}.qmp"));
        let arguments = format!(
            "-nodefaults -no-user-config -display none -accel tcg {arguments} -qmp unix:{},server=on,wait=off",
            socket.display()
        );
        let log = lab.file(&format!("{name}.log"));
        let mut process = Process::start(name, "qemu-system-x86_64", &words(&arguments), &log);
        let stream = wait_for("QMP socket", || {
            process.assert_running();
            UnixStream::connect(&socket).ok()
        });
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let folder = socket.parent().unwrap().to_owned();
        let mut qemu = Qemu { name: name.into(), process, qmp: BufReader::new(stream), folder };
        qemu.line(); // the greeting
        qemu.qmp("qmp_capabilities", json!({}));
        qemu
    }

    /// Executes a QMP command and returns its result. Panics on an error.
    pub(crate) fn qmp(&mut self, command: &str, arguments: Value) -> Value {
        let name = self.name.clone();
        self.try_qmp(command, arguments).unwrap_or_else(|answer| panic!("{name}: {command} failed: {answer}"))
    }

    /// Executes a QMP command and returns its result, or QEMU's reply as the error.
    pub(crate) fn try_qmp(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        let request = json!({"execute": command, "arguments": arguments}).to_string();
        let sent = self.qmp.get_mut().write_all(request.as_bytes()); // one write: QEMU may end before a second one
        if sent.is_err() {
            self.lost(&format!("{sent:?}"));
        }
        loop {
            let mut answer = self.line();
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            if answer.get("event").is_none() {
                return Err(answer);
            }
        }
    }

    /// Connects to QEMU's qtest socket.
    pub(crate) fn qtest(&self) -> Qtest {
        Qtest::connect(&self.folder.join(format!("{}.qtest", self.name)))
    }

    /// Sends the QMP command `quit` and waits until QEMU has ended.
    pub(crate) fn quit(&mut self) {
        self.qmp("quit", json!({}));
        self.process.wait();
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        let read = self.qmp.read_line(&mut line);
        if !matches!(read, Ok(n) if n > 0) {
            self.lost(&format!("{read:?}"));
        }
        serde_json::from_str(&line).unwrap()
    }

    fn lost(&mut self, why: &str) -> ! {
        let status = self.process.wait();
        panic!("{}: QMP connection lost ({why}), ended with {status}", self.name);
    }
}

/// Maps the RAM file of a guest-free QEMU.
pub(crate) fn map_ram(lab: &Lab, name: &str) -> Ram {
    Ram::map(&lab.memory(name))
}

fn guest_free_arguments(lab: &Lab, name: &str, socket: &Path, disk: Disk) -> String {
    let Disk { queues, queue_size, packed } = disk;
    let packed = if packed { "on" } else { "off" };
    let disk = format!(
        "-chardev socket,id=vu,path={},reconnect-ms=100 \
         -device vhost-user-blk-pci,chardev=vu,addr=3,num-queues={queues},queue-size={queue_size},packed={packed}",
        socket.display(),
    );
    machine_arguments(lab, name, &disk)
}

fn machine_arguments(lab: &Lab, name: &str, devices: &str) -> String {
    let firmware = lab.file("halt.bin");
    fs::write(&firmware, halting_firmware()).unwrap();
    format!(
        "-bios {} -machine q35,memory-backend=ram -m {}M \
         -object memory-backend-file,id=ram,size={SIZE},mem-path={},share=on \
         {devices} \
         -qtest unix:{},server=on,wait=off -qtest-log /dev/null",
        firmware.display(),
        SIZE >> 20,
        lab.memory(name).display(),
        lab.file(&format!("{name}.qtest")).display(),
    )
}

/// 64 KiB of HLT instructions. The reset vector, 16 bytes before the end, is one of them. A jump back at the end halts
/// the vCPU again after each wake-up.
fn halting_firmware() -> Vec<u8> {
    const HLT: u8 = 0xf4;
    const JUMP_BACK_3: [u8; 2] = [0xeb, 0xfd]; // to the HLT before it
    let mut image = vec![HLT; 64 << 10];
    let end = image.len();
    image[end - 2..].copy_from_slice(&JUMP_BACK_3);
    image
}
