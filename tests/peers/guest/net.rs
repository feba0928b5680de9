//! The program that runs in a real Linux guest with a network. It sends numbered datagrams to an echo server and
//! compares every byte of the replies. It prints `ok ANSWERED LOST` with increasing counts, or `BAD` and the error.
//! It is built separately with rustc, is statically linked, and belongs to no crate.

use std::net::UdpSocket;
use std::thread;
use std::time::{Duration, Instant};

const ECHO: &str = "10.213.47.1:4747";
const LONGEST: u64 = 9000;

fn main() {
    let socket = UdpSocket::bind("0.0.0.0:4747").unwrap_or_else(|e| bad(&format!("bind: {e}")));
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap_or_else(|e| bad(&format!("timeout: {e}")));
    let (mut answered, mut lost, mut random, mut told) = (0u64, 0u64, 1, Instant::now());
    let mut buffer = vec![0; 65536];
    for number in 1u64.. {
        if told.elapsed() > Duration::from_millis(100) {
            told = Instant::now();
            println!("ok {answered} {lost}");
        }
        let mut datagram = number.to_le_bytes().to_vec();
        let words = next(&mut random) % (LONGEST / 8);
        datagram.extend((0..words).flat_map(|_| next(&mut random).to_le_bytes()));
        if socket.send_to(&datagram, ECHO).is_err() {
            lost += 1;
            thread::sleep(Duration::from_millis(50));
            continue;
        }
        // Replies that arrive too late are skipped.
        let answer = (0..100).map_while(|_| {
            let len = socket.recv(&mut buffer).ok()?;
            Some((buffer[..8.min(len)] == datagram[..8]).then_some(len))
        });
        match answer.flatten().next() {
            Some(len) if buffer[..len] == datagram => answered += 1,
            Some(len) => {
                let at = buffer[..len].iter().zip(&datagram).position(|(a, b)| a != b);
                bad(&format!("datagram {number} of {} bytes: {len} came back, other from {at:?} on", datagram.len()))
            }
            None => lost += 1,
        }
    }
}

fn bad(what: &str) -> ! {
    loop {
        println!("BAD {what}");
        thread::sleep(Duration::from_secs(1));
    }
}

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}
