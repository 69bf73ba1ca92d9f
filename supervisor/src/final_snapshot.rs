//! What the end of a life leaves unsaved. Pure: the owner says how the final snapshot went.
//!
//! Saved is what the head has: the next boot restores that and nothing else.

use crate::agent::{Failure, Verb, code};
use crate::backups::Mode;

/// Why the next boot does not have what this life leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// It lies beside the head, and an operator can get it.
    Fork,
    /// It lies beside the head of another instance; the sentence says what became of it.
    Overtaken(String),
    /// Another instance had the head before.
    Fenced,
    /// The root was lost, and no restore has succeeded since.
    NotRestored,
    /// A further signal cut it short.
    Interrupted(String),
    Failed(String),
}

/// What there is to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tree {
    /// No root, or an empty one.
    Nothing,
    /// Nothing of the gateway was started in this life: the tree is what was there or what was restored.
    Unused,
    Used,
}

/// `ended` is the last backup that ended after the gateway had gone, and whether it is a fork.
pub fn loss(ended: Option<&Result<bool, Failure>>, mode: Mode, tree: Tree) -> Option<Loss> {
    match ended {
        Some(Ok(false)) if mode == Mode::Enabled(Verb::Backup) => None,
        Some(Ok(true)) => Some(Loss::Fork),
        Some(Err(_)) if tree == Tree::Nothing => None,
        Some(Err(failure)) => {
            let error = failure.error.clone();
            Some(match failure.code {
                code::FENCED => Loss::Overtaken(error),
                code::INTERRUPTED => Loss::Interrupted(error),
                _ => Loss::Failed(error),
            })
        }
        Some(Ok(false)) | None => match mode {
            _ if tree != Tree::Used => None,
            Mode::Fenced => Some(Loss::Fenced),
            Mode::Disabled => Some(Loss::NotRestored),
            // It would have been taken.
            Mode::Enabled(_) => None,
        },
    }
}

impl Loss {
    pub fn reason(&self) -> &str {
        match self {
            Self::Fork => "it is a fork: the head stays as it was, and the next boot restores that",
            Self::Fenced => "another instance holds the head: this one takes no more backups",
            Self::NotRestored => "the root was lost, and no restore has succeeded since",
            Self::Overtaken(reason) | Self::Interrupted(reason) | Self::Failed(reason) => reason,
        }
    }

    /// Whether what was to be saved is on the store at least.
    pub fn is_fork(&self) -> bool {
        matches!(self, Self::Fork | Self::Overtaken(_))
    }

    /// Whether it is a failure of this life. Another holder of the head is none: an instance that was started again for such an
    /// exit would take the head back.
    pub fn is_failure(&self) -> bool {
        match self {
            Self::Fork | Self::Overtaken(_) | Self::Fenced => false,
            Self::NotRestored | Self::Interrupted(_) | Self::Failed(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(code: i32) -> Result<bool, Failure> {
        let error = "said".to_owned();
        Err(Failure {
            code,
            error,
            word: None,
        })
    }

    #[test]
    fn what_the_head_does_not_have_is_lost_unless_there_was_nothing_to_save() {
        const BACKUP: Mode = Mode::Enabled(Verb::Backup);
        const FORK: Mode = Mode::Enabled(Verb::Fork);
        let said = || "said".to_owned();
        for (ended, mode, tree, expected) in [
            (Some(Ok(false)), BACKUP, Tree::Used, None),
            (Some(Ok(false)), BACKUP, Tree::Unused, None),
            // The tree shrank, so the agent waits for a confirmation that does not come.
            (Some(Ok(true)), BACKUP, Tree::Used, Some(Loss::Fork)),
            (Some(Ok(true)), FORK, Tree::Used, Some(Loss::Fork)),
            (
                Some(failed(75)),
                BACKUP,
                Tree::Used,
                Some(Loss::Failed(said())),
            ),
            (
                Some(failed(75)),
                BACKUP,
                Tree::Unused,
                Some(Loss::Failed(said())),
            ),
            (Some(failed(75)), BACKUP, Tree::Nothing, None),
            (
                Some(failed(75)),
                FORK,
                Tree::Used,
                Some(Loss::Failed(said())),
            ),
            (
                Some(failed(74)),
                Mode::Disabled,
                Tree::Used,
                Some(Loss::Failed(said())),
            ),
            (
                Some(failed(143)),
                BACKUP,
                Tree::Used,
                Some(Loss::Interrupted(said())),
            ),
            (
                Some(failed(12)),
                Mode::Fenced,
                Tree::Used,
                Some(Loss::Overtaken(said())),
            ),
            (None, Mode::Fenced, Tree::Used, Some(Loss::Fenced)),
            (None, Mode::Disabled, Tree::Used, Some(Loss::NotRestored)),
            // The last one that ended had begun before the gateway stopped.
            (
                Some(Ok(false)),
                Mode::Disabled,
                Tree::Used,
                Some(Loss::NotRestored),
            ),
            // No restore has succeeded, so nothing was started, and the disk has what it had.
            (None, Mode::Disabled, Tree::Unused, None),
            (None, Mode::Disabled, Tree::Nothing, None),
            (None, Mode::Fenced, Tree::Unused, None),
        ] {
            let found = loss(ended.as_ref(), mode, tree);
            assert_eq!(found, expected, "{ended:?} {mode:?} {tree:?}");
        }
    }

    #[test]
    fn what_another_holder_of_the_head_or_a_fork_leaves_unsaved_is_no_failure() {
        let said = || "said".to_owned();
        for loss in [Loss::Fork, Loss::Overtaken(said()), Loss::Fenced] {
            assert!(!loss.is_failure(), "{loss:?}");
        }
        for loss in [
            Loss::NotRestored,
            Loss::Interrupted(said()),
            Loss::Failed(said()),
        ] {
            assert!(loss.is_failure(), "{loss:?}");
        }
    }
}
