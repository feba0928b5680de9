//! Connecting: the greeting that precedes features and memory, and the patience for a back-end that is being started.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use super::super::{FrontendError, Interrupt};
use super::UserOptions;
use super::backend_channel::{Ear, Events};
use super::connection::{Channel, Late};
use super::iommu::Translator;
use crate::abi::bit;
use crate::abi::vhost_user::{
    Request, VHOST_MEMORY_BASELINE_NREGIONS, VHOST_USER_F_PROTOCOL_FEATURES, protocol_feature,
};
use crate::sys::log_limit::limited;

/// Waits between attempts to connect.
pub(super) const BACK_OFF: std::ops::RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_millis(100);
/// What INBAND_NOTIFICATIONS makes no sense without (rule B3.1).
const IN_BAND_NEEDS: u64 = bit(protocol_feature::BACKEND_REQ) | bit(protocol_feature::REPLY_ACK);

/// What a back-end says when it is greeted.
#[derive(Clone, Copy)]
pub(super) struct Offer {
    pub(super) features: u64,
    /// Protocol features agreed on.
    pub(super) protocol: u64,
    pub(super) queues: u16,
    pub(super) slots: usize,
}

/// One connection with everything that precedes features and memory.
pub(super) fn greet(
    path: &Path,
    options: UserOptions,
    events: &Arc<Events>,
    translator: &Arc<Translator>,
    interrupt: &Interrupt,
) -> Result<(Channel, Offer, Option<Ear>), FrontendError> {
    let mut channel = Channel::connect(path, options.timeout, interrupt)?;
    channel.set_late(Late::Owed);
    let number = |channel: &mut Channel, request| channel.ask(request, &[], &[])?.read::<u64>("F3.1");
    channel.post(Request::SET_OWNER, &[], &[])?;
    let features = number(&mut channel, Request::GET_FEATURES)?;
    let mut offer = Offer { features, protocol: 0, queues: 1, slots: VHOST_MEMORY_BASELINE_NREGIONS };
    if features & bit(VHOST_USER_F_PROTOCOL_FEATURES) == 0 {
        // Nobody can say how many rings it has: the guest's driver has to know.
        offer.queues = u16::from(u8::MAX) + 1;
        return Ok((channel, offer, None));
    }
    offer.protocol = number(&mut channel, Request::GET_PROTOCOL_FEATURES)? & options.protocol_features;
    if offer.protocol & IN_BAND_NEEDS != IN_BAND_NEEDS {
        offer.protocol &= !bit(protocol_feature::INBAND_NOTIFICATIONS);
    }
    channel.post(Request::SET_PROTOCOL_FEATURES, offer.protocol.as_bytes(), &[])?;
    let has = |number| offer.protocol & bit(number) != 0;
    if has(protocol_feature::MQ) {
        offer.queues = u16::try_from(number(&mut channel, Request::GET_QUEUE_NUM)?).unwrap_or(u16::MAX);
    }
    if options.queue_pairs {
        offer.queues = offer.queues.saturating_mul(2).saturating_add(1);
    }
    if has(protocol_feature::CONFIGURE_MEM_SLOTS) {
        let slots = number(&mut channel, Request::GET_MAX_MEM_SLOTS)?;
        offer.slots = offer.slots.max(usize::try_from(slots).unwrap_or(usize::MAX));
    }
    if has(protocol_feature::REPLY_ACK) {
        channel.settle()?;
        channel.use_acks();
    }
    if !has(protocol_feature::BACKEND_REQ) {
        return Ok((channel, offer, None));
    }
    let kicks = has(protocol_feature::INBAND_NOTIFICATIONS);
    let (ear, theirs) = Ear::open(events.clone(), translator.clone(), channel.line().clone(), kicks)?;
    channel.post(Request::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
    match channel.settle() {
        Ok(()) => Ok((channel, offer, Some(ear))),
        Err(error @ FrontendError::Refused { .. }) if !has(protocol_feature::INBAND_NOTIFICATIONS) => {
            limited!(warn, "{}: changes of its configuration won't be heard of: {error}", path.display());
            Ok((channel, offer, None))
        }
        Err(error) => Err(error),
    }
}

/// Tries until it works, waiting helps no more, the deadline is over or the interrupt is set. Returns also how many attempts
/// that took.
pub(super) fn until<T>(
    deadline: Instant,
    interrupt: &Interrupt,
    mut attempt: impl FnMut() -> Result<T, FrontendError>,
) -> Result<(T, u32), FrontendError> {
    let (mut wait, mut attempts) = (*BACK_OFF.start(), 1);
    loop {
        let error = match attempt() {
            Ok(done) => return Ok((done, attempts)),
            Err(error) => error,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if !error.is_transient() || left.is_zero() || interrupt.wait(wait.min(left)) {
            return Err(error);
        }
        wait = (wait * 2).min(*BACK_OFF.end());
        attempts += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn transient_errors_are_retried_with_back_off_and_others_are_not() {
        let away = || FrontendError::Connect { path: "s".into(), source: io::ErrorKind::ConnectionRefused.into() };
        let mut attempts = 0;
        let interrupt = Interrupt::new().unwrap();
        let done = until::<()>(Instant::now() + Duration::from_millis(500), &interrupt, || {
            attempts += 1;
            Err(away())
        });
        assert!(done.is_err_and(|error| error.is_transient()));
        // Waits of 1, 2, 4 … 64 ms, then of 100 ms; fewer where threads run late, never more.
        assert!((2..=13).contains(&attempts), "{attempts} attempts");
        attempts = 0;
        let done = until::<()>(Instant::now() + Duration::from_secs(60), &interrupt, || {
            attempts += 1;
            Err(FrontendError::NoIommu)
        });
        assert!(done.is_err() && attempts == 1);
        interrupt.set();
        let done = until::<()>(Instant::now() + Duration::from_secs(3600), &interrupt, || Err(away()));
        assert!(done.is_err_and(|error| error.is_transient()));
    }
}
