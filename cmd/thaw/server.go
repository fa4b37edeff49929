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
	var level string
	var printDefaults bool
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Run storage, attacher, image-mgmt and snapshotter in one process",
		Long: `Run storage, attacher, image-mgmt and snapshotter in one process, for one machine; or,
with --role store, what stores images for others, or, with --role node, what runs
containers of images that others store.

The server may be killed or upgraded at any time: disks in use pause until it is
started again. SIGTERM and Ctrl-C stop it; disks in use stay attached and wait.
'thaw server teardown' takes away what a stopped server left attached.`,
		Example: `  thaw server
  thaw server --root /srv/thaw --run /run/thaw-test --log-level debug
  thaw server --config /etc/thaw/config.toml`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
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
				return fmt.Errorf("thaw server must mount file systems: run it as root: %w", os.ErrPermission)
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
		},
	}
	where.register(cmd)
	cmd.PersistentFlags().StringSliceVar(&where.roles, "role", nil, "store, node or both (default both)")
	cmd.Flags().StringVar(&level, "log-level", "", "debug, info, warn or error")
	cmd.Flags().BoolVar(&printDefaults, "print-config", false, "print the configuration in force and exit")
	cmd.AddCommand(serverTeardown(&where))
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
			keeper, err := keeperCommand(config)
			if err != nil {
				return err
			}
			return daemon.Teardown(cmd.Context(), config, keeper, force, cmd.OutOrStdout())
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
