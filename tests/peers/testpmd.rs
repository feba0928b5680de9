//! DPDK's testpmd as a process. Its port is a vhost-user back-end or a front-end.

use std::path::Path;
use std::process::ExitStatus;

use crate::backend::{listens, words};
use crate::process::{Lab, Process, wait_for};

/// A running testpmd with one port. It forwards from its start, in the mode given by its arguments. It polls, so it
/// occupies one CPU.
pub(crate) struct Testpmd(Process);

/// Counters of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) received: u64,
    pub(crate) received_bytes: u64,
    pub(crate) sent: u64,
    pub(crate) errors: u64,
}

impl Testpmd {
    /// Starts a back-end that listens at `socket` and sends back what it receives. `options` are those of its port.
    pub(crate) fn backend(lab: &Lab, socket: &Path, queues: u16, options: &str) -> Testpmd {
        let port = format!("net_vhost0,iface={},queues={queues}{options}", socket.display());
        let mut testpmd = Testpmd::start(lab, "librte_net_vhost.so", &port, queues, "--forward-mode=io");
        wait_for("testpmd listens", || {
            testpmd.0.assert_running();
            listens(socket).then_some(())
        });
        testpmd
    }

    /// Starts a front-end of the back-end at `socket`. It sends packets all the time. `options` are those of its port.
    pub(crate) fn frontend(lab: &Lab, socket: &Path, queues: u16, options: &str) -> Testpmd {
        let port = format!("net_virtio_user0,path={},queues={queues}{options}", socket.display());
        Testpmd::start(lab, "librte_net_virtio.so", &port, queues, "--forward-mode=flowgen")
    }

    fn start(lab: &Lab, driver: &str, port: &str, queues: u16, forwarding: &str) -> Testpmd {
        let name = format!("testpmd-{}", &driver["librte_net_".len()..]);
        let log = lab.file(&format!("{name}.log"));
        // DPDK processes share files in the runtime directory, so each test has its own.
        let args = format!(
            "RUNTIME_DIRECTORY={} dpdk-testpmd -l 0,1 --no-huge --no-shconf --no-telemetry -m 256 --no-pci -d {driver} \
             --vdev {port} -- --no-numa --nb-cores=1 --total-num-mbufs=4096 --rxq={queues} --txq={queues} \
             --stats-period 1 {forwarding}",
            lab.file("").display()
        );
        Testpmd(Process::start(&name, "env", &words(&args), &log))
    }

    /// The last reported counters of the port.
    pub(crate) fn counters(&mut self) -> Option<Counters> {
        self.0.assert_running();
        let output = self.0.output();
        let told = &output[output.rfind("NIC statistics")?..];
        let number = |name: &str| told.split(name).nth(1)?.split_whitespace().next()?.parse::<u64>().ok();
        Some(Counters {
            received: number("RX-packets:")?,
            received_bytes: number("RX-bytes:")?,
            sent: number("TX-packets:")?,
            errors: number("RX-errors:")? + number("TX-errors:")?,
        })
    }

    /// The number of times that the port's link went up or down.
    pub(crate) fn link_changes(&self) -> usize {
        self.0.output().matches("link state change event").count()
    }

    /// Waits until the process has ended by itself.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.0.wait()
    }

    /// Sends SIGTERM: testpmd stops forwarding, then all rings, and exits.
    pub(crate) fn end(&mut self) {
        self.0.terminate();
        let output = self.0.output();
        assert!(output.contains("Bye..."), "{output}");
    }
}
