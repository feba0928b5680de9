//! The back-end under test and connections to it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use super::connection::{self, Connection, RETRY_INTERVAL, ReplyFlags};
use super::device::TestedDevice;
use super::harness::{FrameInjector, Harness, HarnessConfig, RequestSize, Scatter, wait_until};
use super::negotiation::{BackendFeatures, negotiate_protocol};
use super::options::{CheckError, CheckOptions, FrameSource};
use super::outcome::{CheckAbort, Outcome};
use super::process::BackendProcess;
use super::queue::MAX_RINGS;
use super::ring_variant::{Flow, RingSelection, RingVariant};
use super::stop::StopToken;
use crate::abi::features::protocol_feature_names;
use crate::abi::vhost_user::ProtocolFeatures;
use crate::abi::virtio::{VIRTIO_F_RING_PACKED, VIRTIO_NET_F_MQ, VirtioFeatures};
use crate::inflight::RingKind;
use crate::sys::with_causes::with_causes;

/// Ring size, if the back-end accepts it.
const MAX_RING_SIZE: u16 = 256;
/// Number of entries that a batch needs.
const MIN_RING_SIZE: u16 = 64;
/// Time for a frame to return from a back-end that was not declared a loopback.
const LOOPBACK_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for a stopped check to restore its changes.
const RESTORE_TIME: Duration = Duration::from_secs(5);

/// The back-end under test, and the state of the run.
pub(super) struct Target {
    pub(super) socket: PathBuf,
    pub(super) options: CheckOptions,
    pub(super) replies: Rc<RefCell<ReplyFlags>>,
    pub(super) offered: BackendFeatures,
    pub(super) device: TestedDevice,
    /// Frame source in use, if any.
    pub(super) frame_source: Option<FrameSource>,
    /// Rings of the current check.
    pub(super) variant: RingVariant,
    /// Ring size.
    pub(super) size: u16,
    /// Process of the back-end, if it may be killed and restarted.
    pub(super) process: Option<BackendProcess>,
    /// Last connection. It is closed before the next one, because many back-ends serve one at a time.
    last_connection: RefCell<Option<UnixStream>>,
    /// Changes that could not be restored, in words.
    pub(super) unrestored: Vec<String>,
}

impl Target {
    /// Opens a connection on which only GET_FEATURES was sent.
    pub(super) fn connect(&self) -> Result<Connection, CheckAbort> {
        if let Some(last) = self.last_connection.take() {
            // The connection may be closed already.
            let _ = last.shutdown(Shutdown::Both);
        }
        let deadline = self.options.stop.deadline(self.options.timeout / 4);
        loop {
            let stream = match &self.process {
                Some(process) => process.connect(),
                None => self.connect_with_retry(),
            };
            let connection =
                Connection::from_stream(stream.map_err(CheckAbort::Connect)?, &self.options, self.replies.clone());
            match connection.barrier() {
                // A back-end that opens its socket again for each connection resets those that arrive before it has
                // closed the old one.
                Err(CheckAbort::HungUp { .. }) if !deadline.is_over() => thread::sleep(RETRY_INTERVAL),
                answer => {
                    answer?;
                    *self.last_connection.borrow_mut() = Some(connection.try_clone()?);
                    return Ok(connection);
                }
            }
        }
    }

    /// Connects to a back-end that may open its socket only after its last connection has ended.
    fn connect_with_retry(&self) -> io::Result<UnixStream> {
        let deadline = self.options.stop.deadline(self.options.timeout / 4);
        loop {
            match connection::connect(&self.socket, self.options.timeout, &self.options.stop) {
                Err(error) if is_absent(&error) && !deadline.is_over() => thread::sleep(RETRY_INTERVAL),
                connected => return connected,
            }
        }
    }

    /// Returns a harness: a new connection with features, memory and one ring that is not started.
    pub(super) fn harness(&self, features: VirtioFeatures) -> Result<Harness, CheckAbort> {
        self.harness_with_rings(features, 1)
    }

    /// Like [`harness`](Target::harness), with the ring started.
    pub(super) fn started(&self, features: VirtioFeatures) -> Result<Harness, CheckAbort> {
        let harness = self.harness(features)?;
        harness.start()?;
        Ok(harness)
    }

    /// Like [`harness`](Target::harness), with several rings for requests.
    pub(super) fn harness_with_rings(&self, features: VirtioFeatures, rings: usize) -> Result<Harness, CheckAbort> {
        self.build_harness(features, rings, None)
    }

    /// Like [`harness`](Target::harness), behind an IOMMU.
    pub(super) fn harness_behind_iommu(
        &self,
        features: VirtioFeatures,
        scatter: Scatter,
        rings: usize,
    ) -> Result<Harness, CheckAbort> {
        self.offered.require_iommu()?;
        self.build_harness(features, rings, Some(scatter))
    }

    fn build_harness(
        &self,
        features: VirtioFeatures,
        rings: usize,
        iommu: Option<Scatter>,
    ) -> Result<Harness, CheckAbort> {
        let Target { device, variant, size, .. } = *self;
        // Connect first: the frame source may depend on the connection.
        let connection = self.connect()?;
        let source = if variant.flow == Flow::Receive { self.frame_injector()? } else { None };
        let config = HarnessConfig { device, variant, size, features, rings, source, iommu };
        let mut harness = Harness::new(connection, self.offered, &self.options, config)?;
        harness.begin_session()?;
        Ok(harness)
    }

    /// Returns the requested ring size, or the largest that the back-end accepts.
    fn probe_ring_size(&mut self) -> Result<u16, CheckError> {
        loop {
            let (size, smaller) = (self.size, self.size / 2);
            match self
                .harness(VirtioFeatures::empty())
                .and_then(|harness| harness.all().try_for_each(|queue| harness.send_size(queue)))
            {
                Ok(()) => return Ok(size),
                Err(CheckAbort::Refused { .. } | CheckAbort::HungUp { .. })
                    if self.options.queue_size.is_none() && smaller >= MIN_RING_SIZE =>
                {
                    self.size = smaller;
                    if self.check_served().is_err() {
                        // The back-end may exit when it refuses a message.
                        let again = self.replace().and_then(|()| self.check_served());
                        again.map_err(|abort| CheckError::QueueSizeRefused(size, with_causes(&abort).to_string()))?;
                    }
                }
                Err(abort) => return Err(CheckError::QueueSizeRefused(size, with_causes(&abort).to_string())),
            }
        }
    }

    /// Like [`harness`](Target::harness), with more protocol features.
    pub(super) fn harness_with_protocol(&self, protocol: ProtocolFeatures) -> Result<Harness, CheckAbort> {
        self.offered.require_protocol(protocol)?;
        let mut harness = self.harness(VirtioFeatures::empty())?;
        harness.protocol |= protocol;
        harness.reconnect(self.connect()?)?;
        Ok(harness)
    }

    /// Opens the frame source.
    pub(super) fn frame_injector(&self) -> Result<Option<FrameInjector>, CheckAbort> {
        Ok(match &self.frame_source {
            None => None,
            Some(FrameSource::Loop) => Some(FrameInjector::Loop),
            Some(FrameSource::Interface(name)) => Some(FrameInjector::interface(name)?),
            Some(FrameSource::Tcp(address)) => Some(FrameInjector::Tcp(TcpStream::connect(address)?)),
            Some(FrameSource::Backend(socket)) if matches!(self.device, TestedDevice::Vsock(_)) => {
                Some(FrameInjector::VsockHost(socket.clone(), VecDeque::new()))
            }
            Some(FrameSource::Backend(socket)) => {
                let connect = || Connection::connect(socket, &self.options, Rc::default()).map_err(CheckAbort::Connect);
                let connection = connect()?;
                let offered = negotiate_protocol(&connection)?;
                drop(connection);
                let variant = RingVariant { packed: false, flow: Flow::Transmit };
                let (device, size) = (TestedDevice::Net, MIN_RING_SIZE);
                let config = HarnessConfig {
                    device,
                    variant,
                    size,
                    features: VirtioFeatures::empty(),
                    rings: 1,
                    source: None,
                    iommu: None,
                };
                let harness = Harness::new(connect()?, offered, &self.options, config)?;
                harness.start()?;
                Some(FrameInjector::Backend(Box::new(harness)))
            }
        })
    }

    /// Returns the maximum number of rings with requests at the same time.
    pub(super) fn max_rings(&self) -> usize {
        let offered = usize::try_from(self.offered.queues).unwrap_or(MAX_RINGS);
        match self.device {
            TestedDevice::Blk(_) => offered.min(MAX_RINGS),
            // One queue is the high-priority queue.
            TestedDevice::Fs => offered.saturating_sub(1).clamp(1, MAX_RINGS - 1),
            TestedDevice::Rng | TestedDevice::Vsock(_) | TestedDevice::Console => 1,
            // Queue pairs; without MQ there is one.
            TestedDevice::Net if !self.offered.has(VIRTIO_NET_F_MQ) => 1,
            TestedDevice::Net => self.options.pairs.map_or(offered, usize::from).min(offered).min(MAX_RINGS / 2),
        }
    }

    /// Fails if the back-end does not serve another front-end.
    pub(super) fn check_served(&self) -> Result<(), CheckAbort> {
        self.connect().map(|_| ())
    }

    /// Kills the back-end and starts a new one.
    pub(super) fn replace(&mut self) -> Result<(), CheckAbort> {
        if let Some(process) = &mut self.process {
            process.kill()?;
            process.start()?;
        }
        Ok(())
    }

    /// Restores the changes of a check with `undo`, also after a stop. If that fails and the back-end may be killed,
    /// retries with a new one.
    pub(super) fn restore_changes(
        &mut self,
        undo: impl Fn(&Target) -> Result<(), CheckAbort>,
    ) -> Result<(), CheckAbort> {
        let stop = self.options.stop.clone();
        self.set_stop(stop.delayed(RESTORE_TIME));
        let mut done = undo(self);
        if done.is_err() && self.process.is_some() {
            self.set_stop(stop.delayed(2 * RESTORE_TIME));
            done = self.replace().and_then(|()| undo(self));
        }
        self.set_stop(stop);
        done
    }

    /// Fails if the check was stopped.
    pub(super) fn check_stop(&mut self) -> Result<(), CheckError> {
        match self.options.stop.is_set() {
            true => Err(CheckError::Stopped { unrestored: std::mem::take(&mut self.unrestored) }),
            false => Ok(()),
        }
    }

    fn set_stop(&mut self, stop: StopToken) {
        if let Some(process) = &mut self.process {
            process.stop = stop.clone();
        }
        self.options.stop = stop;
    }

    /// Finds out if the back-end serves a second front-end or exits after the first.
    fn probe_second_connection(&self) -> Result<(), CheckAbort> {
        let deadline = self.options.stop.deadline(self.options.timeout);
        while let Err(abort) = self.check_served() {
            if self.process.is_none() || deadline.is_over() {
                return Err(abort);
            }
            thread::sleep(RETRY_INTERVAL);
        }
        self.process.iter().for_each(BackendProcess::mark_exit_known);
        Ok(())
    }

    /// Returns the rings that a check is run on.
    pub(super) fn variants(&self, run_on: RingSelection) -> Vec<RingVariant> {
        let main = self.main_flow();
        let data = match self.device.has_requests() {
            true => Some(main),
            false => self.frame_source.as_ref().map(|_| Flow::Receive),
        };
        let flows = match run_on {
            RingSelection::Once | RingSelection::Main => vec![main],
            RingSelection::Data => data.into_iter().collect(),
            RingSelection::DataOrMain => vec![data.unwrap_or(main)],
            RingSelection::All | RingSelection::AllSplit | RingSelection::AllPacked => {
                std::iter::once(main).chain(data.filter(|data| *data != main)).collect()
            }
        };
        let split = self.options.rings != Some(RingKind::Packed) && run_on != RingSelection::AllPacked;
        let packed = self.offered.has(VIRTIO_F_RING_PACKED) && self.options.rings != Some(RingKind::Split);
        let packed = packed && run_on != RingSelection::AllSplit;
        let kinds = split.then_some(false).into_iter().chain(packed.then_some(true));
        let kinds = kinds.take(if run_on == RingSelection::Once { 1 } else { 2 });
        kinds.flat_map(|packed| flows.iter().map(move |flow| RingVariant { packed, flow: *flow })).collect()
    }

    /// Returns the outcome of a check that is run on no ring.
    pub(super) fn skip_outcome(&self, run_on: RingSelection) -> Outcome {
        match run_on {
            RingSelection::AllPacked if !self.offered.has(VIRTIO_F_RING_PACKED) => {
                CheckAbort::NotOffered("RING_PACKED".into()).into()
            }
            RingSelection::AllSplit | RingSelection::AllPacked => Outcome::not_tested("excluded by --rings"),
            _ => Outcome::not_tested("only received data is written to memory: give a --frame-source"),
        }
    }

    pub(super) fn main_flow(&self) -> Flow {
        match self.device.has_requests() {
            true => Flow::Requests,
            false => Flow::Transmit,
        }
    }
}

/// Connects to the back-end and to the frame source.
pub(super) fn prepare(socket: &Path, options: &CheckOptions) -> Result<Target, CheckError> {
    let process = start(socket, options)?;
    let replies = Rc::new(RefCell::new(ReplyFlags::default()));
    let path = || socket.to_path_buf();
    let busy = || CheckError::Busy { path: path(), waited: options.timeout };
    let stream = match &process {
        Some(process) => process.connect().map_err(CheckError::Start)?,
        None => connection::connect(socket, options.timeout, &options.stop).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => busy(),
            _ => CheckError::Connect { path: path(), source },
        })?,
    };
    let connection = Connection::from_stream(stream, options, replies.clone());
    let negotiated = negotiate_protocol(&connection)
        .and_then(|offered| Ok((offered, TestedDevice::of(&connection, offered, options.device)?)));
    let negotiation_error =
        |abort: CheckAbort| CheckError::Negotiation { path: path(), reason: with_causes(&abort).to_string() };
    let (offered, device) = negotiated.map_err(|abort| match abort {
        CheckAbort::Timeout { .. } if connection.is_unread() => busy(),
        CheckAbort::UnknownDevice(reason) => CheckError::UnknownDevice { path: path(), reason },
        abort => negotiation_error(abort),
    })?;
    drop(connection);
    if options.rings == Some(RingKind::Packed) && !offered.has(VIRTIO_F_RING_PACKED) {
        return Err(CheckError::NotPacked);
    }
    let packed = options.rings == Some(RingKind::Packed);
    let flow = if device.has_requests() { Flow::Requests } else { Flow::Transmit };
    let variant = RingVariant { packed, flow };
    let (frame_source, size) = (options.frame_source.clone(), options.queue_size.unwrap_or(MAX_RING_SIZE));
    let (socket, options, last_connection, unrestored) = (path(), options.clone(), RefCell::default(), Vec::new());
    let mut target = Target {
        socket,
        options,
        replies,
        offered,
        device,
        frame_source,
        variant,
        size,
        process,
        last_connection,
        unrestored,
    };
    target
        .probe_second_connection()
        .map_err(|abort| CheckError::NoSecondConnection { path: path(), reason: with_causes(&abort).to_string() })?;
    target.size = target.probe_ring_size()?;
    if target.device.has_requests() {
        return Ok(target);
    }
    target.variant.flow = Flow::Receive;
    match &target.options.frame_source {
        Some(frame_source) => wait_for_frame(&target).map_err(|abort| CheckError::FrameSource {
            frame_source: frame_source.clone(),
            reason: with_causes(&abort).to_string(),
        })?,
        None => {
            target.frame_source = Some(FrameSource::Loop);
            if !loops_back(&target).map_err(negotiation_error)? {
                target.frame_source = None;
            }
        }
    }
    Ok(target)
}

/// Starts the back-end if a command is given.
pub(super) fn start(socket: &Path, options: &CheckOptions) -> Result<Option<BackendProcess>, CheckError> {
    let Some(command) = &options.restart else { return Ok(None) };
    let process = BackendProcess::new(command, socket, options);
    if options.kill_pid.is_none() {
        if connection::connect(socket, options.timeout, &options.stop).is_ok() {
            return Err(CheckError::SocketInUse { path: socket.into() });
        }
        process.start().map_err(CheckError::Start)?;
    }
    Ok(Some(process))
}

/// Returns a receive ring with one buffer.
fn receive_harness(target: &Target) -> Result<Harness, CheckAbort> {
    let mut harness = target.started(VirtioFeatures::empty())?;
    harness.add(1, RequestSize::Mixed)?;
    harness.publish();
    Ok(harness)
}

/// Waits for a frame of the frame source. A host interface also has other frames.
fn wait_for_frame(target: &Target) -> Result<(), CheckAbort> {
    let mut harness = receive_harness(target)?;
    let deadline = harness.deadline(harness.timeout);
    harness.finish()?;
    while harness.frames_received == 0 {
        if deadline.is_over() {
            return Err(CheckAbort::Violation(format!("only other frames within {:?}", harness.timeout)));
        }
        harness.run_batch(1, RequestSize::Mixed)?;
    }
    Ok(())
}

/// Returns true if the back-end sends back what it receives.
fn loops_back(target: &Target) -> Result<bool, CheckAbort> {
    let mut harness = receive_harness(target)?;
    wait_until(&harness.deadline(LOOPBACK_TIMEOUT), || {
        if harness.pop()? && harness.frames_received == 0 {
            harness.add(1, RequestSize::Mixed)?;
            harness.publish();
        }
        Ok(harness.frames_received > 0)
    })
}

pub(super) fn describe_backend(target: &Target) -> String {
    let BackendFeatures { features, protocol, queues } = target.offered;
    let names = protocol_feature_names(protocol).replace(',', "");
    let mut device = target.device.name();
    if let Some(frame_source) = &target.frame_source {
        device += &format!(", frame source {frame_source:?}");
    }
    let size = target.size;
    format!("{device}, {queues} queues, rings of {size}, features {features:?}, protocol features {names}")
}

/// Returns true for errors of a socket without a listener.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
}
