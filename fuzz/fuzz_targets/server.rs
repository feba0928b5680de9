//! Connections: the messages of `device` over a socket, in segments of any length, with wrong headers.
//!
//! Input: the device, the features, then the steps (`hostile`); before each message, the lengths of its segments.
#![no_main]

mod hostile;

use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use hostile::{Guest, Input, Link, check_for_leaks, device};
use libfuzzer_sys::fuzz_target;
use nix::sys::eventfd::EventFd;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, Header};
use vhost_migrate::backend::serve_connection;
use zerocopy::IntoBytes;

struct Socket(UnixStream);

impl Link for Socket {
    fn send(&mut self, input: &mut Input<'_>, code: Code, flags: u32, payload: &[u8], fds: Vec<OwnedFd>) -> bool {
        let how = input.byte();
        let (mut flags, mut size) = (flags, payload.len() as u32);
        match how {
            0xff => size ^= 1 << (input.byte() % 32),
            0xfe => flags = input.byte().into(),
            _ => {}
        }
        let bytes = [Header { request: code.0, flags, size }.as_bytes(), payload].concat();
        let cut = if how & 1 == 0 { bytes.len() } else { 1 + usize::from(input.byte()) % bytes.len() };
        let (first, second) = bytes.split_at(cut);
        // The fds come with the first segment, as the specification says, or with the second.
        let early = how & 2 == 0 || second.is_empty();
        let sent =
            self.segment(first, if early { &fds } else { &[] }) && self.segment(second, if early { &[] } else { &fds });
        // Replies are read, because the device stops reading while its socket is full.
        let mut answers = [0; 4096];
        while matches!((&self.0).read(&mut answers), Ok(1..)) {}
        sent
    }
}

impl Socket {
    fn segment(&self, bytes: &[u8], fds: &[OwnedFd]) -> bool {
        if bytes.is_empty() {
            return true;
        }
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(count) => return count == bytes.len(),
                Err(nix::errno::Errno::EAGAIN) => std::thread::yield_now(),
                Err(_) => return false,
            }
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let mut input = Input(input);
    let disk = device(0);
    drop(disk);
    check_for_leaks(|| {
        let device = device(input.byte());
        let bits = input.byte();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let stop = EventFd::new().unwrap();
        let mut guest = Guest::new(&*device, bits);
        std::thread::scope(|scope| {
            let serving = scope.spawn(|| serve_connection(&theirs, &device, stop.as_fd()));
            let mut link = Socket(ours);
            guest.run(&mut input, &mut link);
            if bits & 0x80 != 0 {
                stop.write(1).unwrap();
            }
            drop(link);
            serving.join().unwrap();
        });
        guest.check();
    });
});
