//! The identity that file work is done with.

use nix::{
    errno::Errno,
    unistd::{Gid, Uid, setfsgid, setfsuid},
};

use crate::error::Error;

/// A user and its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub uid: Uid,
    pub gid: Gid,
}

impl Identity {
    /// Gives the calling thread, and no other, this user's rights on files.
    ///
    /// With a file-system user other than root the kernel also ignores root's overrides (`CAP_DAC_OVERRIDE` and the like, see
    /// setfsuid(2)), so that a planted link opens nothing that the user could not open himself. Supplementary groups are
    /// dropped for the whole process by [`drop_groups`].
    ///
    /// Without `CAP_SETUID` or `CAP_SETGID` the kernel changes nothing and says nothing, and the work would be done as root.
    /// Only the answer to a second call tells.
    pub fn assume(self) -> Result<(), Error> {
        setfsgid(self.gid);
        setfsuid(self.uid);
        if setfsgid(self.gid) == self.gid && setfsuid(self.uid) == self.uid {
            return Ok(());
        }
        let user = format!("user {}, group {}", self.uid, self.gid);
        Err(Error::local("do file work as", user)(Errno::EPERM))
    }
}

/// Whose rights on files the calling thread has.
pub fn current() -> Uid {
    // An id that nobody has changes nothing; the answer is the one in force (setfsuid(2)).
    setfsuid(Uid::from_raw(u32::MAX))
}

/// Gives up root's supplementary groups, which [`Identity::assume`] would otherwise leave in force.
pub fn drop_groups() -> Result<(), nix::Error> {
    nix::unistd::setgroups(&[])
}

/// Runs file work on a thread of its own that has the identity, and waits for it without holding up anything else.
///
/// The thread is not taken from a pool: the identity must not stick to one that later works for the store.
pub async fn with_identity<T: Send + 'static>(
    identity: Option<Identity>,
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    // Boxed, or the compiler would make a copy of the thread's whole start for each.
    let work: Box<dyn FnOnce() + Send> = Box::new(move || {
        let done = identity.map_or(Ok(()), Identity::assume).map(|()| work());
        // Nobody waits any more when the bound ran out.
        let _ = sender.send(done);
    });
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(work).map_err(Error::local("start", name))?;
    receiver.await.map_err(|_| Error::Internal(name))?
}
