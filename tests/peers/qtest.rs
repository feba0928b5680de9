//! The qtest protocol of QEMU: port I/O, memory-mapped I/O and memory writes in place of a vCPU.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::process::{DEADLINE, wait_for};

pub(crate) struct Qtest {
    stream: BufReader<UnixStream>,
    pending: String,
    commands: usize,
}

impl Qtest {
    pub(crate) fn connect(socket: &Path) -> Qtest {
        let stream = wait_for("qtest socket", || UnixStream::connect(socket).ok());
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        Qtest { stream: BufReader::new(stream), pending: String::new(), commands: 0 }
    }

    /// Queues a write of guest memory, as a vCPU would make it. Writes are executed in order. They are done after
    /// [`Qtest::flush`] or any other command.
    pub(crate) fn write(&mut self, gpa: u64, bytes: &[u8]) {
        let _ = write!(self.pending, "write {gpa:#x} {:#x} 0x", bytes.len());
        for byte in bytes {
            let _ = write!(self.pending, "{byte:02x}");
        }
        self.pending.push('\n');
        self.commands += 1;
    }

    /// Queues a fill of guest memory with one byte.
    pub(crate) fn fill(&mut self, gpa: u64, len: u64, byte: u8) {
        let _ = writeln!(self.pending, "memset {gpa:#x} {len:#x} {byte:#x}");
        self.commands += 1;
    }

    /// Sends the queued commands and waits until all of them are done.
    pub(crate) fn flush(&mut self) {
        self.stream.get_mut().write_all(self.pending.as_bytes()).unwrap();
        self.pending.clear();
        for _ in 0..std::mem::take(&mut self.commands) {
            self.answer();
        }
    }

    /// Executes a command that stores, for example `outl` or `writew`.
    pub(crate) fn store(&mut self, command: &str, address: u64, value: u64) {
        let _ = writeln!(self.pending, "{command} {address:#x} {value:#x}");
        self.commands += 1;
        self.flush();
    }

    /// Executes a command that loads, for example `inl` or `readb`.
    pub(crate) fn load(&mut self, command: &str, address: u64) -> u64 {
        self.flush();
        self.stream.get_mut().write_all(format!("{command} {address:#x}\n").as_bytes()).unwrap();
        let answer = self.answer();
        let digits = answer.trim().trim_start_matches("0x");
        u64::from_str_radix(digits, 16).unwrap_or_else(|_| panic!("{command} {address:#x}: {answer}"))
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("an answer on the qtest socket");
        line.strip_prefix("OK").unwrap_or_else(|| panic!("qtest said: {line:?}")).to_owned()
    }
}
