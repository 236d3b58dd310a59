//! Loading modules of the lab's kernel. What is there is named in `modules.txt`.

use std::path::Path;

use crate::command::run;

/// Loads a module with all that it depends on. One that is loaded already stays as it is.
pub(crate) fn load(name: &str) {
    run("modprobe", &[name]);
}

/// Loads a module whose first user opens `device`, and checks that it can be opened.
pub(crate) fn load_for(device: &str, name: &str) {
    load(name);
    assert!(
        Path::new(device).exists(),
        "{name} is loaded and there is no {device}"
    );
    if let Err(error) = std::fs::File::options().read(true).write(true).open(device) {
        panic!("{device}: {error}");
    }
}
