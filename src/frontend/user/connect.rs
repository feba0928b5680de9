//! Connection set-up: negotiation of features, and retries until a starting back-end accepts.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use super::super::{FrontendError, Interrupt};
use super::UserOptions;
use super::backend_channel::{BackendChannel, EventQueue};
use super::connection::{Connection, TimeoutPolicy};
use super::translator::Translator;
use crate::abi::vhost_user::{
    FrontendRequest, ProtocolFeatures, VHOST_MEMORY_BASELINE_NREGIONS, VHOST_USER_F_PROTOCOL_FEATURES,
};
use crate::abi::virtio::VirtioFeatures;
use crate::sys::log_limit::limited;
use crate::sys::with_causes::with_causes;

/// Range of waits between connection attempts.
pub(super) const BACK_OFF: std::ops::RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_millis(100);
/// Protocol features that INBAND_NOTIFICATIONS depends on (rule B3.1).
const IN_BAND_REQUIREMENTS: ProtocolFeatures = ProtocolFeatures::BACKEND_REQ.union(ProtocolFeatures::REPLY_ACK);

/// Result of the negotiation with a back-end.
#[derive(Clone, Copy)]
pub(super) struct Negotiated {
    pub(super) features: VirtioFeatures,
    /// Negotiated protocol features.
    pub(super) protocol: ProtocolFeatures,
    pub(super) queues: u16,
    pub(super) slots: usize,
}

/// Connects and negotiates everything that precedes features and memory.
pub(super) fn negotiate(
    path: &Path,
    options: UserOptions,
    events: &Arc<EventQueue>,
    translator: &Arc<Translator>,
    interrupt: &Interrupt,
) -> Result<(Connection, Negotiated, Option<BackendChannel>), FrontendError> {
    let mut connection = Connection::connect(path, options.timeout, interrupt)?;
    connection.set_timeout_policy(TimeoutPolicy::Keep);
    let number = |connection: &mut Connection, request| connection.request(request, &[], &[])?.read::<u64>("F3.1");
    connection.send(FrontendRequest::SET_OWNER, &[], &[])?;
    let features = VirtioFeatures::from_bits_retain(number(&mut connection, FrontendRequest::GET_FEATURES)?);
    let mut negotiated =
        Negotiated { features, protocol: ProtocolFeatures::empty(), queues: 1, slots: VHOST_MEMORY_BASELINE_NREGIONS };
    if !features.contains(VHOST_USER_F_PROTOCOL_FEATURES) {
        // Without MQ the back-end cannot report its number of rings; the guest's driver has to know it.
        negotiated.queues = u16::from(u8::MAX) + 1;
        return Ok((connection, negotiated, None));
    }
    let offered = number(&mut connection, FrontendRequest::GET_PROTOCOL_FEATURES)?;
    negotiated.protocol = ProtocolFeatures::from_bits_retain(offered) & options.protocol_features;
    if !negotiated.protocol.contains(IN_BAND_REQUIREMENTS) {
        negotiated.protocol &= !ProtocolFeatures::INBAND_NOTIFICATIONS;
    }
    connection.send(FrontendRequest::SET_PROTOCOL_FEATURES, negotiated.protocol.as_bytes(), &[])?;
    let has = |feature| negotiated.protocol.contains(feature);
    if has(ProtocolFeatures::MQ) {
        negotiated.queues = u16::try_from(number(&mut connection, FrontendRequest::GET_QUEUE_NUM)?).unwrap_or(u16::MAX);
    }
    if options.queue_pairs {
        negotiated.queues = negotiated.queues.saturating_mul(2).saturating_add(1);
    }
    if has(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
        let slots = number(&mut connection, FrontendRequest::GET_MAX_MEM_SLOTS)?;
        negotiated.slots = negotiated.slots.max(usize::try_from(slots).unwrap_or(usize::MAX));
    }
    if has(ProtocolFeatures::REPLY_ACK) {
        connection.wait_for_acks()?;
        connection.enable_acks();
    }
    if !has(ProtocolFeatures::BACKEND_REQ) {
        return Ok((connection, negotiated, None));
    }
    let kicks = has(ProtocolFeatures::INBAND_NOTIFICATIONS);
    let (backend_channel, theirs) =
        BackendChannel::open(events.clone(), translator.clone(), connection.socket().clone(), kicks)?;
    connection.send(FrontendRequest::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
    match connection.wait_for_acks() {
        Ok(()) => Ok((connection, negotiated, Some(backend_channel))),
        Err(error @ FrontendError::Refused { .. }) if !has(ProtocolFeatures::INBAND_NOTIFICATIONS) => {
            limited!(warn, "{}: configuration changes are not received: {}", path.display(), with_causes(&error));
            Ok((connection, negotiated, None))
        }
        Err(error) => Err(error),
    }
}

/// Repeats `attempt` until it succeeds, fails with an error that waiting does not fix, the deadline passes or the
/// interrupt is set. Also returns the number of attempts.
pub(super) fn retry_until<T>(
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
        let done = retry_until::<()>(Instant::now() + Duration::from_millis(500), &interrupt, || {
            attempts += 1;
            Err(away())
        });
        assert!(done.is_err_and(|error| error.is_transient()));
        // Waits of 1, 2, 4 … 64 ms, then of 100 ms. A loaded machine makes fewer attempts, never more.
        assert!((2..=13).contains(&attempts), "{attempts} attempts");
        attempts = 0;
        let done = retry_until::<()>(Instant::now() + Duration::from_secs(60), &interrupt, || {
            attempts += 1;
            Err(FrontendError::NoIommu)
        });
        assert!(done.is_err() && attempts == 1);
        interrupt.set();
        let done = retry_until::<()>(Instant::now() + Duration::from_secs(3600), &interrupt, || Err(away()));
        assert!(done.is_err_and(|error| error.is_transient()));
    }
}
