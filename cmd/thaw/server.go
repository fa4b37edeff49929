package main

import (
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/thaw-project/thaw/daemon"
	"github.com/thaw-project/thaw/keeper"
	"github.com/thaw-project/thaw/kind"
)

func newServer() *cobra.Command {
	var where place
	cmd := process(&where, daemon.ProcessServer, &cobra.Command{
		Use:   "server",
		Short: "Run storage, attacher, image-mgmt and snapshotter in one process",
		Long: `Run storage, attacher, image-mgmt and snapshotter in one process, for one machine; or,
with --role store, what stores images for others, or, with --role node, what runs
containers of images that others store. 'thaw attacher', 'thaw image-mgmt' and
'thaw snapshotter' run the same parts in processes of their own.

The server may be killed or upgraded at any time: disks in use pause until it is
started again. SIGTERM and Ctrl-C stop it; disks in use stay attached and wait.
'thaw server teardown' takes away what stopped processes left attached.`,
		Example: `  thaw server
  thaw server --root /srv/thaw --run /run/thaw-test --log-level debug
  thaw server --config /etc/thaw/config.toml`,
	})
	cmd.PersistentFlags().StringSliceVar(&where.roles, "role", nil, "store, card, images, snapshots, or node for the last two; may be repeated (default store,node)")
	cmd.AddCommand(serverTeardown(&where))
	return cmd
}

func newAttacher() *cobra.Command {
	var where place
	cmd := process(&where, daemon.ProcessAttacher, &cobra.Command{
		Use:   "attacher",
		Short: "Run what has the lvols, or the card, in a process of its own",
		Long: `Run what has the lvols (role store), what shows disks to the host that this card is
plugged into (role card), or both, in a process of its own. The lvols are in a pool of
its own, or in what [pool] of the configuration names.

It may be killed or upgraded at any time. With a pool of its own, nodes' reads pause
until it is back; with SPDK, 'thaw target' or Ceph nobody notices.`,
		Example: `  thaw attacher
  thaw attacher --config /etc/thaw/card.toml --role card`,
	})
	cmd.Flags().StringSliceVar(&where.roles, "role", nil, "store, card or both (default those of the configuration)")
	return cmd
}

func newImageManagement() *cobra.Command {
	var where place
	return process(&where, daemon.ProcessImages, &cobra.Command{
		Use:   "image-mgmt",
		Short: "Run what turns blocks into disks, in a process of its own",
		Long: `Run what attaches blocks of images and turns them into disks, in a process of its own:
on the machine that runs containers, or with images.mode "dpu" on the card that is
plugged into it. Without a [[remote]] store it uses the attacher of this machine.

It may be killed or upgraded at any time: disks that it serves pause until it is back.`,
		Example: "  thaw image-mgmt --config /etc/thaw/config.toml",
	})
}

func newSnapshotter() *cobra.Command {
	var where place
	return process(&where, daemon.ProcessSnapshots, &cobra.Command{
		Use:   "snapshotter",
		Short: "Run containerd's snapshotter in a process of its own",
		Long: `Run containerd's snapshotter in a process of its own. It asks image-mgmt, on this
machine or on the card that is plugged into it, for disks; storage passes through
neither.`,
		Example: "  thaw snapshotter --config /etc/thaw/config.toml",
	})
}

// process makes cmd run one of the processes.
func process(where *place, p daemon.Process, cmd *cobra.Command) *cobra.Command {
	var level string
	var printDefaults bool
	cmd.Args = noArgs
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		where.process = p
		config, err := where.load()
		if err != nil {
			return err
		}
		if level != "" {
			if err := config.LogLevel.UnmarshalText([]byte(level)); err != nil {
				return usage{fmt.Errorf("--log-level %.40q: must be debug, info, warn or error", level)}
			}
		}
		if printDefaults {
			return daemon.PrintConfig(cmd.OutOrStdout(), config)
		}
		if os.Geteuid() != 0 {
			return fmt.Errorf("%s must mount file systems: run it as root: %w", cmd.CommandPath(), os.ErrPermission)
		}
		// Memory is for containers: collect earlier than Go's default.
		debug.SetGCPercent(50)
		logger := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: config.LogLevel}))
		keeper, err := keeperCommand(config)
		if err != nil {
			return err
		}
		err = daemon.Serve(cmd.Context(), config, keeper, logger)
		if kind.Of(err) == kind.Corrupt {
			return fmt.Errorf("%w: restore %s from a backup, or start with another --root and convert the images again", err, config.Root)
		}
		return err
	}
	where.register(cmd)
	cmd.Flags().StringVar(&level, "log-level", "", "debug, info, warn or error")
	cmd.Flags().BoolVar(&printDefaults, "print-config", false, "print the configuration in force and exit")
	return cmd
}

// keeperCommand is how a server starts its keeper: this very program.
func keeperCommand(config daemon.Config) ([]string, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program to start the keeper: %w", err)
	}
	return []string{exe, "keeper", "--socket", config.Paths().KeeperSocket}, nil
}

func serverTeardown(where *place) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "teardown",
		Short: "Unmount and detach what a stopped server left attached",
		Long: `Unmount and detach what a stopped server left attached: block mounts, loop devices,
the presentation and the keeper. Nothing on disk is deleted. What a container still
uses makes it fail, unless --force, which breaks that container.`,
		Example: "  thaw server teardown --force",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := where.load()
			if err != nil {
				return err
			}
			return daemon.Teardown(cmd.Context(), config, keeperCommand, force, cmd.OutOrStdout())
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also detach what is in use")
	return cmd
}

func newKeeper() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:    "keeper",
		Short:  "Hold the FUSE descriptor while servers come and go (started by the server)",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if socket == "" {
				return usage{fmt.Errorf("--socket is required: 'thaw server' starts the keeper by itself")}
			}
			return keeper.Run(cmd.Context(), keeper.Options{Socket: socket, Logger: slog.New(slog.DiscardHandler)})
		},
	}
	cmd.Flags().StringVar(&socket, "socket", "", "Unix socket to listen on")
	return cmd
}
