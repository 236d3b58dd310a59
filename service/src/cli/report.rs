//! `vmferry report`: makes a page from the records of a migration.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use super::output;
use crate::observe::record::read;
use crate::observe::report;

#[derive(Args, Debug)]
#[command(after_help = "Examples:\n  \
    vmferry run --mem 1G --qmp /tmp/a.qmp --record /var/lib/vmferry\n  \
    vmferry report /var/lib/vmferry/*-source.json -o report.html\n  \
    vmferry report source.json target.json -o report.html\n\n\
    The page holds everything it shows and loads nothing. Given the records of\n\
    both sides, it shows what was sent and what was received.")]
pub(super) struct ReportArgs {
    /// Record of a migration, as `run --record` writes it; a second one of the other side
    #[arg(value_name = "FILE", required = true, num_args = 1..=2)]
    records: Vec<PathBuf>,
    /// Page to write
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

impl ReportArgs {
    pub(super) fn execute(self) -> anyhow::Result<ExitCode> {
        let records = self.records.iter().map(|path| read::read(path));
        let records = records.collect::<Result<Vec<_>, _>>()?;
        let mut nonce = [0; 16];
        rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())
            .context("no random number for the page")?;
        let nonce = format!("{:032x}", u128::from_ne_bytes(nonce));
        let page = report::page(&records, &nonce)?;
        let failed = || format!("cannot write {}", self.output.display());
        write_page(&self.output, &page).with_context(failed)?;
        output::note(format_args!("vmferry: wrote {}", self.output.display()));
        Ok(ExitCode::SUCCESS)
    }
}

/// Whole or not at all: a page that was there before stays if the disk is full. What is no file, such as /dev/stdout, is written to and
/// not replaced.
fn write_page(path: &Path, page: &str) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok_and(|meta| !meta.is_file()) {
        return fs::write(path, page);
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new()
        .prefix(".report-")
        // Less what the umask takes away, like any file that the user makes.
        .permissions(fs::Permissions::from_mode(0o666))
        .tempfile_in(folder)?;
    file.write_all(page.as_bytes())?;
    file.persist(path)?;
    Ok(())
}
