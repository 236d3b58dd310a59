//! Which pages a device has written, asked of the device and of its container.

use std::sync::Arc;

use vmferry_devices::vfio::face::Iova;
use vmferry_devices::vfio::{
    ContainerFace, FdContainer, FdFace, Mapped, VfioDevice, VfioFace, VfioSet, dirty_logs,
};
use vmferry_transport::memory::DirtyMap;
use vmferry_transport::units::{BlockId, PageCount, PageIndex};

use super::Vm;
use crate::mdev::Mdev;
use crate::vfio::Opened;

const PAGES: u64 = 64;

/// Maps memory for a device in two parts.
fn map(opened: &Opened) -> [Mapped; 2] {
    [0, 1].map(|part| {
        let mapped = Mapped {
            iova: part << 32,
            block: BlockId(0),
            start: PageIndex(part * PAGES),
            count: PageCount(PAGES),
        };
        opened.map(mapped.iova, PAGES * 4096);
        mapped
    })
}

#[test]
fn dirty_logs_of_a_device_and_of_its_container_are_started_read_and_stopped() {
    let vm = Vm::new(1);
    let opened = &vm.opened[0];
    let mapped = map(opened);
    let mut map = DirtyMap::new([PageCount(2 * PAGES)]);

    // Debian builds its kernel without what a report needs. The device says that it logs, and starts to.
    let face = FdFace::new(opened.device());
    assert!(face.logs_dma().unwrap());
    let range = Iova {
        start: 0,
        bytes: PAGES * 4096,
    };
    face.start_dma_logging(4096, &[range]).unwrap();
    let mut words = [0];
    let reported = face.report_dma(range, 4096, &mut words);
    face.stop_dma_logging().unwrap();
    let mut logs = dirty_logs(&vm.set, None, &mapped).unwrap();
    assert_eq!(logs.len(), 1);
    match reported {
        Ok(()) => {
            assert_eq!(logs[0].name(), "vfio-dma");
            for _ in 0..2 {
                logs[0].start().unwrap();
                logs[0].fetch(&mut map).unwrap();
                logs[0].fetch(&mut map).unwrap();
                logs[0].stop().unwrap();
            }
            // mtty has no DMA: whatever it marked would be wrong.
            assert_eq!(map.count(), PageCount(0));
        }
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
            assert_eq!(logs[0].name(), "vfio-mapped");
        }
    }

    let container = Arc::new(FdContainer::new(opened.container()));
    let tracking = container.tracking().unwrap().unwrap();
    assert_eq!(tracking.page_bytes, 4096);
    let mdpy = Mdev::mdpy();
    let without_log = Opened::new(&mdpy);
    let set = VfioSet::new(vec![VfioDevice::new(
        "vfio/0",
        FdFace::new(without_log.device()),
    )]);
    let mut logs = dirty_logs(&set, Some(container.clone()), &mapped).unwrap();
    assert_eq!(logs[0].name(), "vfio-container");
    for _ in 0..2 {
        logs[0].start().unwrap();
        logs[0].fetch(&mut map).unwrap();
        logs[0].stop().unwrap();
        // Not started, it does not answer, rather than to say that nothing was written.
        let error = logs[0].fetch(&mut map).unwrap_err();
        assert_eq!(error.source.raw_os_error(), Some(libc::EINVAL), "{error:?}");
    }
    assert_eq!(map.count(), PageCount(0));
    container.start_dirty_pages().unwrap();
    let half = Iova {
        start: 0,
        bytes: PAGES / 2 * 4096,
    };
    let error = container.get_dirty_pages(half, 4096, &mut [0]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    container.stop_dirty_pages().unwrap();
    drop((logs, set, without_log));

    let logs = dirty_logs(&VfioSet::new(Vec::new()), None, &mapped).unwrap();
    assert!(logs.is_empty(), "no device, no log");
}
