//! What a launcher told this process: which of how many it is, and where they meet.

use crate::error::{Error, Result};

/// Where ranks meet if the launcher says nothing of it.
const ADDRESS: &str = "127.0.0.1";
/// The port before the one at which they then meet: MASTER_PORT's usual value.
const PORT: u16 = 29_500;

/// One of several processes that train together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Who started them.
    pub launcher: &'static str,
    /// Number of this one, from 0.
    pub rank: u32,
    /// How many there are, two or more.
    pub world: u32,
    /// Number of this one among those of its machine.
    pub local_rank: u32,
    /// How many there are on this machine; `world` where the launcher does not tell.
    pub local_world: u32,
    /// Host name or address of rank 0's machine.
    pub address: String,
    /// TCP port at which rank 0 waits for the others: the one after MASTER_PORT, which is the launcher's own.
    pub port: u16,
}

/// Names of a launcher's variables.
struct Launcher {
    name: &'static str,
    rank: &'static str,
    world: &'static str,
    /// Of the machine; the first that there is counts.
    local_rank: &'static [&'static str],
    local_world: &'static [&'static str],
    /// Whether it says where the ranks meet.
    master: bool,
}

/// An inner launcher's variables count before those of the one that started it: mpirun within a SLURM job.
const LAUNCHERS: [Launcher; 4] = [
    Launcher {
        name: "torchrun",
        rank: "RANK",
        world: "WORLD_SIZE",
        local_rank: &["LOCAL_RANK"],
        local_world: &["LOCAL_WORLD_SIZE"],
        master: true,
    },
    Launcher {
        name: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        world: "OMPI_COMM_WORLD_SIZE",
        local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
        local_world: &["OMPI_COMM_WORLD_LOCAL_SIZE"],
        master: false,
    },
    Launcher {
        name: "MPICH or Intel MPI",
        rank: "PMI_RANK",
        world: "PMI_SIZE",
        local_rank: &["MPI_LOCALRANKID", "SLURM_LOCALID"],
        local_world: &["MPI_LOCALNRANKS"],
        master: false,
    },
    // Not SLURM_NTASKS, which a batch script has that starts one process on its own.
    Launcher {
        name: "srun",
        rank: "SLURM_PROCID",
        world: "SLURM_STEP_NUM_TASKS",
        local_rank: &["SLURM_LOCALID"],
        local_world: &[],
        master: false,
    },
];

impl Launch {
    /// As the environment says; None for a process that is alone.
    pub fn from_environment() -> Result<Option<Self>> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// As `variable` says of each name. Errors where variables contradict each other or one is missing, by its name.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        // A batch script has a SLURM_PROCID, too.
        let there =
            |l: &Launcher| variable(l.world).is_some() || (l.name != "srun" && variable(l.rank).is_some());
        let Some(launcher) = LAUNCHERS.iter().find(|l| there(l)) else { return Ok(None) };
        let bad = |what: String| Error::InvalidArgument(format!("environment of {}: {what}", launcher.name));
        let number = |name: &str| -> Result<Option<u32>> {
            let Some(text) = variable(name) else { return Ok(None) };
            match text.trim().parse() {
                Ok(n) => Ok(Some(n)),
                Err(_) => Err(bad(format!("{name}={text} is not a number"))),
            }
        };
        let needed = |name: &str, other: &str| match number(name)? {
            Some(n) => Ok(n),
            None => Err(bad(format!("{other} is set, {name} is not"))),
        };
        let (rank, world) = (needed(launcher.rank, launcher.world)?, needed(launcher.world, launcher.rank)?);
        if rank >= world {
            return Err(bad(format!("{}={rank} is not less than {}={world}", launcher.rank, launcher.world)));
        }
        if world == 1 {
            return Ok(None);
        }
        let first_of = |names: &[&str]| -> Result<Option<u32>> {
            let mut found = names.iter().map(|name| number(name));
            found.find(|n| !matches!(n, Ok(None))).unwrap_or(Ok(None))
        };
        let Some(local_rank) = first_of(launcher.local_rank)? else {
            return Err(bad(format!(
                "{} is not set: it says which of the machine's GPUs is this process's",
                launcher.local_rank[0]
            )));
        };
        if local_rank > rank {
            return Err(bad(format!(
                "{}={local_rank} is more than {}={rank}",
                launcher.local_rank[0], launcher.rank
            )));
        }
        let local_world = first_of(launcher.local_world)?;
        if let Some(local) = local_world.filter(|&local| local_rank >= local || local > world) {
            return Err(bad(format!(
                "{}={local} does not fit {}={local_rank} and {}={world}",
                launcher.local_world[0], launcher.local_rank[0], launcher.world
            )));
        }
        let (address, port) = (variable("MASTER_ADDR"), number("MASTER_PORT")?);
        if launcher.master && (address.is_none() || port.is_none()) {
            let name = if port.is_none() { "MASTER_PORT" } else { "MASTER_ADDR" };
            return Err(bad(format!("{} is set, {name} is not", launcher.rank)));
        }
        let machines = number("SLURM_NNODES")?.unwrap_or(1);
        let elsewhere =
            local_world.is_some_and(|local| local < world) || (launcher.name == "srun" && machines > 1);
        if elsewhere && address.is_none() {
            return Err(bad("processes on several machines: MASTER_ADDR must name the one of rank 0".into()));
        }
        let port = port.unwrap_or(PORT.into());
        let Some(port) = u16::try_from(port).ok().filter(|&p| p > 0).and_then(|p| p.checked_add(1)) else {
            return Err(bad(format!("MASTER_PORT={port} is not from 1 to 65534")));
        };
        Ok(Some(Self {
            launcher: launcher.name,
            rank,
            world,
            local_rank,
            local_world: local_world.unwrap_or(world),
            address: address.unwrap_or(ADDRESS.into()),
            port,
        }))
    }

    /// The CUDA device of this process among `count` that it sees: that of its number on the machine, or the only one (a launcher
    /// may show each process its own).
    pub fn device(&self, count: u32) -> Result<u32> {
        match self.local_rank {
            own if own < count => Ok(own),
            _ if count == 1 => Ok(0),
            own => Err(Error::InvalidArgument(format!(
                "process {own} of this machine has no CUDA device: the driver shows {count}; start one process a device"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(variables: &[(&str, &str)]) -> Result<Option<Launch>> {
        let find = |name: &str| variables.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        Launch::from_variables(find)
    }

    fn error(variables: &[(&str, &str)]) -> String {
        launch(variables).expect_err("contradictory").to_string()
    }

    const TORCHRUN: [(&str, &str); 6] = [
        ("RANK", "5"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "4"),
        ("MASTER_ADDR", "node0"),
        ("MASTER_PORT", "29400"),
    ];

    /// Torchrun's variables with one of another value, or none.
    fn with(name: &'static str, value: Option<&'static str>) -> Vec<(&'static str, &'static str)> {
        let others = TORCHRUN.into_iter().filter(|(n, _)| *n != name);
        others.chain(value.map(|v| (name, v))).collect()
    }

    #[test]
    fn every_launchers_variables_are_understood() {
        assert_eq!(launch(&[]).unwrap(), None);
        let expected = Launch {
            launcher: "torchrun",
            rank: 5,
            world: 8,
            local_rank: 1,
            local_world: 4,
            address: "node0".into(),
            port: 29_401,
        };
        assert_eq!(launch(&TORCHRUN).unwrap(), Some(expected.clone()));
        let own =
            Launch { rank: 1, world: 2, local_world: 2, address: ADDRESS.into(), port: 29_501, ..expected };
        let open_mpi = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("SLURM_PROCID", "0"),
            ("SLURM_STEP_NUM_TASKS", "1"),
        ];
        assert_eq!(launch(&open_mpi).unwrap(), Some(Launch { launcher: "Open MPI", ..own.clone() }));
        let pmi = [("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "1")];
        assert_eq!(launch(&pmi).unwrap(), Some(Launch { launcher: "MPICH or Intel MPI", ..own.clone() }));
        let slurm = [("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2"), ("SLURM_LOCALID", "1")];
        assert_eq!(launch(&slurm).unwrap(), Some(Launch { launcher: "srun", ..own }));
    }

    #[test]
    fn a_process_alone_is_alone() {
        assert_eq!(launch(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap(), None);
        assert_eq!(launch(&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")]).unwrap(), None);
        // A batch script that starts it without srun.
        assert_eq!(launch(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]).unwrap(), None);
    }

    #[test]
    fn contradictions_are_named() {
        for (variables, words) in [
            (with("RANK", Some("8")), ["RANK=8", "WORLD_SIZE=8"]),
            (with("RANK", Some("x")), ["RANK=x", "not a number"]),
            (with("WORLD_SIZE", None), ["RANK is set", "WORLD_SIZE is not"]),
            (with("RANK", None), ["WORLD_SIZE is set", "RANK is not"]),
            (with("LOCAL_RANK", None), ["LOCAL_RANK is not set", "GPUs"]),
            (with("LOCAL_RANK", Some("4")), ["LOCAL_WORLD_SIZE=4", "LOCAL_RANK=4"]),
            (with("LOCAL_RANK", Some("6")), ["LOCAL_RANK=6", "RANK=5"]),
            (with("MASTER_PORT", None), ["RANK is set", "MASTER_PORT is not"]),
            (with("MASTER_ADDR", None), ["RANK is set", "MASTER_ADDR is not"]),
            (with("MASTER_PORT", Some("65535")), ["MASTER_PORT=65535", "65534"]),
            (with("MASTER_PORT", Some("0")), ["MASTER_PORT=0", "from 1"]),
        ] {
            let error = error(&variables);
            assert!(words.iter().all(|w| error.contains(w)), "{error}");
            assert!(error.contains("torchrun"), "{error}");
        }
        let two_machines = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "1"),
        ];
        assert!(error(&two_machines).contains("MASTER_ADDR"));
        let slurm = [
            ("SLURM_STEP_NUM_TASKS", "4"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NNODES", "2"),
            ("SLURM_PROCID", "1"),
        ];
        assert!(error(&slurm).contains("MASTER_ADDR"));
        assert!(error(&slurm[..3]).contains("SLURM_PROCID is not"));
    }

    #[test]
    fn a_process_takes_the_device_of_its_number_or_the_only_one() {
        let launch = launch(&TORCHRUN).unwrap().unwrap();
        assert_eq!((launch.device(2).unwrap(), launch.device(1).unwrap()), (1, 0));
        let third = Launch { local_rank: 3, ..launch };
        assert!(third.device(2).unwrap_err().to_string().contains("shows 2"));
    }
}
