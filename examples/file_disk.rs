//! A disk out of a file, for any vhost-user front-end: `cargo run --example file_disk -- SOCKET IMAGE`

use std::{error::Error, fs::File, io, os::fd::AsFd, os::unix::fs::FileExt, os::unix::net::UnixStream, sync::Arc};
use vhost_migrate::abi::virtio::*;
use vhost_migrate::backend::{BackendListener, Queue, RING_FEATURES, Request, SyncQueue, VirtioDevice, serve};

struct Disk(Arc<File>);

impl VirtioDevice for Disk {
    fn features(&self) -> VirtioFeatures {
        RING_FEATURES | VIRTIO_BLK_F_FLUSH
    }

    fn config(&self) -> Vec<u8> {
        let bytes = self.0.metadata().map_or(0, |metadata| metadata.len());
        (bytes / SECTOR_BYTES).to_le_bytes().to_vec()
    }

    fn start_queue(&self, _index: u16, _size: u16, _features: VirtioFeatures) -> io::Result<Box<dyn Queue>> {
        let file = self.0.clone();
        Ok(Box::new(SyncQueue::new(move |request: &mut Request| {
            let status = if transfer(&file, request).is_ok() { VIRTIO_BLK_S_OK } else { VIRTIO_BLK_S_IOERR };
            let _ = request.write(request.writable_len().saturating_sub(1), &[status]);
        })))
    }
}

fn transfer(file: &File, request: &mut Request) -> Result<(), Box<dyn Error>> {
    const HEADER: u64 = size_of::<BlkRequestHeader>() as u64;
    let header: BlkRequestHeader = request.read_obj(0)?;
    let len = match header.request_type.get() {
        VIRTIO_BLK_T_IN => request.writable_len().saturating_sub(1),
        VIRTIO_BLK_T_OUT => request.readable_len() - HEADER,
        VIRTIO_BLK_T_FLUSH => return Ok(file.sync_data()?),
        _ => return Err("no such request".into()),
    };
    let start = header.sector.get().checked_mul(SECTOR_BYTES).ok_or("no such sector")?;
    let end = start.checked_add(len).filter(|end| *end <= file.metadata().map_or(0, |metadata| metadata.len()));
    let (mut buffer, end) = ([0; 64 << 10], end.ok_or("behind the end of the disk")?);
    for at in (start..end).step_by(buffer.len()) {
        let part = &mut buffer[..(end - at).min(64 << 10) as usize];
        if header.request_type.get() == VIRTIO_BLK_T_IN {
            file.read_exact_at(part, at)?;
            request.write(at - start, part)?;
        } else {
            request.read(HEADER + at - start, part)?;
            file.write_all_at(part, at)?;
        }
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, socket, image] = &arguments[..] else { return Err("usage: file_disk SOCKET IMAGE".into()) };
    let disk: Arc<dyn VirtioDevice> = Arc::new(Disk(Arc::new(File::options().read(true).write(true).open(image)?)));
    let (stop, _never) = UnixStream::pair()?;
    Ok(serve(&BackendListener::bind(socket)?, &disk, stop.as_fd())?)
}
