//! Sessions of a hostile front-end and guest with real devices and workers, also while the rings run: no panic, no
//! write outside the memory table, no fd or thread left.
//!
//! Input: the device, the features, then the steps (`hostile`).
#![no_main]

mod hostile;

use std::os::fd::OwnedFd;

use hostile::{Guest, Input, Link, check_for_leaks, device};
use libfuzzer_sys::fuzz_target;
use vhost_migrate::abi::vhost_user::FrontendRequest as Code;
use vhost_migrate::unstable::backend::{MessageOutcome, Session, VhostUserMessage, Workers};

struct Direct {
    session: Session,
    rings: Workers,
}

impl Link for Direct {
    fn send(&mut self, _: &mut Input<'_>, code: Code, flags: u32, payload: &[u8], fds: Vec<OwnedFd>) -> bool {
        let message = VhostUserMessage { code, flags, payload: payload.to_vec(), fds };
        !matches!(self.session.handle_message(message, &mut self.rings), MessageOutcome::Close(_))
    }
}

fuzz_target!(|input: &[u8]| {
    let mut input = Input(input);
    // It stays open, so it is created before fds are counted.
    let disk = device(0);
    drop(disk);
    check_for_leaks(|| {
        let device = device(input.byte());
        let bits = input.byte();
        let mut guest = Guest::new(&*device, bits);
        let mut link = Direct { session: Session::new(device.clone()), rings: Workers::new(device) };
        guest.run(&mut input, &mut link);
        if bits & 0x80 != 0 {
            link.rings.stop_all();
        }
        drop(link);
        guest.check();
    });
});
