//! How the owner's own state becomes the status that is published. What a restore, a backup or an exit adds to it is noted
//! where that is handled.

use std::time::SystemTime;

use super::Owner;
use crate::agent::Verb;
use crate::backups::Mode;
use crate::gateway::state::{Phase, State};

/// So many failures in a row, and what the gateway writes about them is of interest.
const TELLING_FAILURES: u32 = 5;

impl Owner {
    /// What the status tells of a new phase.
    pub(super) fn entered(&mut self, state: &State) {
        let at = match state.phase {
            Phase::Held { until } | Phase::Backoff { until } | Phase::Failed { until } => {
                Some(until)
            }
            _ => None,
        };
        let wait = at.map(|at| at.saturating_sub(self.now()));
        self.status.next_attempt = wait.map(|wait| SystemTime::now() + wait);
        match state.phase {
            Phase::Running { .. } => self.status.shows_stderr = false,
            Phase::Failed { .. } => self.status.shows_stderr = true,
            Phase::Backoff { .. } if state.failures >= TELLING_FAILURES => {
                self.status.shows_stderr = true;
            }
            _ => {}
        }
    }

    pub(super) fn publish(&mut self) {
        if self.next_backup != self.backups.next() {
            self.next_backup = self.backups.next();
            let wait = self.next_backup.map(|next| next.saturating_sub(self.now()));
            self.status.next_backup = wait.map(|wait| SystemTime::now() + wait);
        }
        let gateway = self.process.as_ref().filter(|process| process.is_gateway);
        self.status.pid = gateway.map(|process| process.pid.as_raw());
        self.status.gateway = self.state.word();
        self.status.restarts = self.starts.saturating_sub(1);
        self.status.backup = self.backups.word();
        self.status.is_forking = self.backups.mode() == Mode::Enabled(Verb::Fork);
        self.status.version += 1;
        self.published.send_replace(self.status.clone());
    }
}
