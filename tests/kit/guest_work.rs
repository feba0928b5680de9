//! Waiting for the work of a built-in guest.
#![allow(dead_code, unused_imports)] // not every test binary uses all of it

use vhost_migrate::guest::Guest;

pub(crate) use crate::wait::{PATIENCE, wait_until};

/// Waits until `condition` is true of a guest, which must not fail meanwhile.
pub(crate) fn wait_for(guest: &Guest, what: &str, mut condition: impl FnMut(&Guest) -> bool) {
    wait_until(what, || {
        assert!(guest.failure().is_none(), "{what}: {}", guest.failure().unwrap());
        condition(guest)
    });
}

/// Waits until the guest has completed `requests` more requests.
pub(crate) fn run_for(guest: &Guest, requests: u64) {
    let before = guest.stats().completions;
    wait_for(guest, "requests are completed", |guest| guest.stats().completions >= before + requests);
}

/// Lets the guest work for a while, and compares every byte.
pub(crate) fn assert_works(guest: &mut Guest) {
    run_for(guest, 100);
    guest.verify().unwrap();
}
