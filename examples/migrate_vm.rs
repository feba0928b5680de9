//! A toy VMM that is moved to another process while its vCPU writes memory. In two terminals:
//! `cargo run --example migrate_vm -- destination unix:vm.sock`, `cargo run --example migrate_vm -- source unix:vm.sock`
//!
//! The vCPU has one register, `step`. Step `n` writes `n` to page `n % PAGES`, so the register tells what every page must
//! contain. The destination verifies that no write was lost, before and after the vCPU has run there.

use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vhost_migrate::dirty::{DirtySource, Log, LogSource};
use vhost_migrate::memory::{GuestAddress, LOG_PAGE, Memory, MemoryError, Region};
use vhost_migrate::migrate::*;
use vhost_migrate::stream::{CancelToken, StreamListener, StreamOptions, Uri, connect};

const PAGES: u64 = 1024;

struct Vm {
    memory: Memory,
    log: Arc<Log>,
    step: u64,
    /// The thread of the vCPU, which returns its register. It ends when `stop` is dropped.
    vcpu: Option<JoinHandle<Result<u64, MemoryError>>>,
    stop: Option<mpsc::Sender<()>>,
}

impl Vm {
    fn new(gpa: GuestAddress, size: u64) -> Result<Vm, VmError> {
        let region = Region::create(gpa, size)?;
        let memory = Memory::new([Arc::new(region)])?;
        let (log, _fd_for_devices) = Log::create(memory.end())?;
        Ok(Vm { memory, log: Arc::new(log), step: 1, vcpu: None, stop: None })
    }

    fn verify(&self) -> Result<(), VmError> {
        for page in 0..PAGES {
            // The last step that wrote this page, 0 if none did.
            let expected = if self.step > page { (self.step - 1 - page) / PAGES * PAGES + page } else { 0 };
            let mut found = [0; 8];
            self.memory.read(GuestAddress(page * LOG_PAGE), &mut found)?;
            if u64::from_le_bytes(found) != expected {
                return Err(format!("page {page} has {found:?} and should have step {expected}").into());
            }
        }
        Ok(())
    }
}

impl SourceVm for Vm {
    fn memory(&self) -> Memory {
        self.memory.clone()
    }

    fn dirty_source(&mut self) -> Result<Box<dyn DirtySource>, VmError> {
        Ok(Box::new(LogSource::new("vcpu", self.log.clone())))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.stop = None;
        if let Some(thread) = self.vcpu.take() {
            self.step = thread.join().map_err(|_| "the vCPU has panicked")??;
        }
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>, VmError> {
        Ok(self.step.to_le_bytes().into())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        let (memory, log, mut step) = (self.memory.clone(), self.log.clone(), self.step);
        let (stop, stopped) = mpsc::channel::<()>();
        let thread = thread::spawn(move || {
            while stopped.recv_timeout(Duration::from_micros(20)) == Err(mpsc::RecvTimeoutError::Timeout) {
                let gpa = GuestAddress(step % PAGES * LOG_PAGE);
                memory.write(gpa, &step.to_le_bytes())?;
                log.mark(gpa, 8);
                step += 1;
            }
            Ok(step)
        });
        (self.vcpu, self.stop) = (Some(thread), Some(stop));
        Ok(())
    }

    fn release(&mut self) {}
}

/// The guest at the destination, once its memory exists.
struct Incoming(Option<Vm>);

impl IncomingVm for Incoming {
    fn prepare(&mut self, regions: &[RegionLayout]) -> Result<Memory, VmError> {
        let [region] = regions else { return Err("this VMM has one region of memory".into()) };
        Ok(self.0.insert(Vm::new(region.gpa, region.size)?).memory())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), VmError> {
        let vm = self.0.as_mut().ok_or("state before memory")?;
        vm.step = u64::from_le_bytes(state.try_into()?);
        vm.verify()
    }

    fn start(&mut self, run: bool, _cancel: &CancelToken) -> Result<Option<u64>, VmError> {
        self.0.as_mut().filter(|_| run).map(Vm::resume).transpose()?;
        Ok(None)
    }
}

fn source(uri: &Uri) -> Result<(), VmError> {
    let mut vm = Vm::new(GuestAddress(0), PAGES * LOG_PAGE)?;
    vm.resume()?;
    thread::sleep(Duration::from_millis(500));
    let parameters = MigrationParameters::default();
    let connection = connect(uri, &StreamOptions::new()?)?;
    let moved = migrate(&mut vm, connection, &parameters, &mut |_| {})?;
    println!("source: moved at step {} in {} rounds, downtime {:.1} ms", vm.step, moved.rounds, moved.downtime_ms);
    Ok(())
}

fn destination(uri: &Uri) -> Result<(), VmError> {
    // Records the outcome, and answers a source that has lost the connection.
    let outcomes = Outcomes::default();
    let listener = MigrationListener::start(StreamListener::bind(uri)?, outcomes.clone())?;
    let connection = listener.next()?.ok_or("no migration")?;
    let mut incoming = Incoming(None);
    receive(&mut incoming, connection, &outcomes, SWITCHOVER_TIMEOUT)?;
    let mut vm = incoming.0.ok_or("no guest")?;
    let arrived = vm.step;
    thread::sleep(Duration::from_millis(500));
    vm.pause()?;
    vm.verify()?;
    println!("destination: ran from step {arrived} to {}, all {PAGES} pages verified", vm.step);
    Ok(())
}

fn main() -> Result<(), VmError> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, side, uri] = &arguments[..] else { return Err("usage: migrate_vm source|destination URI".into()) };
    if side == "source" { source(&uri.parse()?) } else { destination(&uri.parse()?) }
}
