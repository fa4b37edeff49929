package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/thaw-project/thaw/attacher/identity"
	attacherrpc "github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/opi"
	"github.com/thaw-project/thaw/opi/dpusim"
	"github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/target/rpc"
)

const defaultBridgeSocket = "/run/thaw/bridge.sock"

// bridgeGrace is how long requests may go on when the bridge is asked to end. What they
// change may be asked for again.
const bridgeGrace = 5 * time.Second

type bridgeFlags struct {
	target, socket, listen string
	files                  attacherrpc.Files
	clients                []string
	level                  string
	sim, simDir            string
	simFunctions           int
}

func newBridge() *cobra.Command {
	var f bridgeFlags
	cmd := &cobra.Command{
		Use:   "bridge",
		Short: "Serve OPI's storage API over a target's JSON-RPC methods",
		Long: `Serve OPI's storage API (opi_api.storage.v1) and the LogicalVolume service over the
JSON-RPC methods of a target, SPDK or 'thaw target'.

It keeps nothing: all it answers it reads from the target. It may be killed and started
at any time, before or after the target.

On TCP both ends need certificates ('thaw certificate'), and only the clients named by
--client may call: whoever may can read and destroy all that the target has.`,
		Example: `  thaw bridge --target /var/tmp/spdk.sock
  thaw bridge --listen 192.0.2.1:9605 --certificate dpu.pem --key dpu.key --ca ca.pem --client store`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var level slog.Level
			if err := level.UnmarshalText([]byte(f.level)); err != nil {
				return usage{fmt.Errorf("--log-level %.40q: must be debug, info, warn or error", f.level)}
			}
			if err := f.validate(); err != nil {
				return usage{err}
			}
			debug.SetGCPercent(50)
			return f.run(cmd.Context(), slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})))
		},
	}
	cmd.Flags().StringVar(&f.target, "target", defaultTargetSocket, "the target's Unix socket for JSON-RPC")
	cmd.Flags().StringVar(&f.socket, "socket", defaultBridgeSocket, "Unix socket to serve gRPC on, mode 0600")
	cmd.Flags().StringVar(&f.listen, "listen", "", "TCP address to serve gRPC on too, with mutual TLS (default none)")
	cmd.Flags().StringVar(&f.files.Certificate, "certificate", "", "PEM file: this bridge's certificate, for --listen")
	cmd.Flags().StringVar(&f.files.Key, "key", "", "PEM file: its key")
	cmd.Flags().StringVar(&f.files.CA, "ca", "", "PEM file: who signs clients' certificates")
	cmd.Flags().StringSliceVar(&f.clients, "client", nil, "name in the certificate of a client that may call; may be repeated")
	cmd.Flags().StringVar(&f.sim, "dpu-sim", "", "QMP socket of a virtual machine whose root ports rp0, rp1, ... play the card's PCIe functions; the target must be a thaw target (default none)")
	cmd.Flags().IntVar(&f.simFunctions, "dpu-sim-functions", dpusim.DefaultFunctions, "how many root ports that machine has")
	cmd.Flags().StringVar(&f.simDir, "dpu-sim-sockets", "/run/thaw/dpu-sim", "folder for the NBD sockets between the target and that machine")
	cmd.Flags().StringVar(&f.level, "log-level", "info", "debug, info, warn or error")
	return cmd
}

func (f *bridgeFlags) validate() error {
	given := f.files.Certificate != "" && f.files.Key != "" && f.files.CA != "" && len(f.clients) > 0
	some := f.files.Certificate != "" || f.files.Key != "" || f.files.CA != "" || len(f.clients) > 0
	if f.listen != "" && !given {
		return errors.New("--listen needs --certificate, --key, --ca and at least one --client")
	}
	if f.listen == "" && some {
		return errors.New("--certificate, --key, --ca and --client are for --listen")
	}
	for _, c := range f.clients {
		if err := identity.CheckNode(c); err != nil {
			return fmt.Errorf("--client: %w", err)
		}
	}
	return nil
}

// run serves until ctx ends.
func (f *bridgeFlags) run(ctx context.Context, log *slog.Logger) error {
	client, err := spdk.New(spdk.Options{Socket: f.target})
	if err != nil {
		return err
	}
	defer client.Close()
	var functions opi.Functions
	if f.sim != "" {
		if functions, err = dpusim.New(dpusim.Options{QMP: f.sim, Target: client, Functions: f.simFunctions, Dir: f.simDir, Log: log}); err != nil {
			return err
		}
	}
	bridge, err := opi.New(opi.Options{Target: client, Functions: functions, Log: log})
	if err != nil {
		return err
	}
	var listeners []net.Listener
	var servers []*grpc.Server
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	add := func(l net.Listener, more ...grpc.ServerOption) {
		s := grpc.NewServer(append(append(attacherrpc.ServerOptions(), more...), grpc.ChainUnaryInterceptor(bridge.Refusals))...)
		bridge.Register(s)
		listeners, servers = append(listeners, l), append(servers, s)
	}
	if err := os.MkdirAll(filepath.Dir(f.socket), 0o700); err != nil {
		return fmt.Errorf("directory of the socket: %w", err)
	}
	l, err := rpc.Listen(f.socket)
	if err != nil {
		return err
	}
	add(l)
	if f.listen != "" {
		credentials, err := attacherrpc.ServerTLS(f.files)
		if err != nil {
			return err
		}
		l, err := listenTCP("--listen", f.listen)
		if err != nil {
			return err
		}
		add(l, credentials, grpc.ChainUnaryInterceptor(f.admit))
	}
	f.look(ctx, log, client, functions)
	log.Info("bridge ready", "socket", f.socket, "listen", f.listen, "target", f.target)
	return serveBridge(ctx, log, servers, listeners)
}

// lookFor bounds how long the bridge looks for the others before it serves.
const lookFor = 2 * time.Second

// look says in the log which of those that the bridge needs is not there: they may come
// later, but who mistyped a path should not learn so from the first call.
func (f *bridgeFlags) look(ctx context.Context, log *slog.Logger, client *spdk.Client, functions opi.Functions) {
	ctx, cancel := context.WithTimeout(ctx, lookFor)
	defer cancel()
	if _, err := client.GetVersion(ctx); err != nil {
		log.Warn("the target does not answer yet: start it, or name its socket with --target", "target", f.target, "err", err)
		return // the functions are half the target's
	}
	if functions == nil {
		return
	}
	if _, err := functions.Plugged(ctx, ""); err != nil {
		log.Warn("the card's machine does not answer yet: start it, or name its QMP socket with --dpu-sim", "socket", f.sim, "err", err)
	}
}

// admit lets in the clients that are named.
func (f *bridgeFlags) admit(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	name, ok, err := attacherrpc.Node(ctx)
	if err != nil {
		return nil, err
	}
	if !ok || !slices.Contains(f.clients, name) {
		return nil, kind.Errorf(kind.Denied, "client %.128q may not call this bridge: it is not named by --client", name)
	}
	return next(ctx, req)
}

func serveBridge(ctx context.Context, log *slog.Logger, servers []*grpc.Server, listeners []net.Listener) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var serving sync.WaitGroup
	for i, s := range servers {
		serving.Go(func() {
			if err := s.Serve(listeners[i]); err != nil {
				cancel(fmt.Errorf("serve %s: %w", listeners[i].Addr(), err))
			}
		})
	}
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.Warn("tell systemd", "err", err)
	}
	<-ctx.Done()
	log.Info("bridge stops")
	late := time.AfterFunc(bridgeGrace, func() {
		for _, s := range servers {
			s.Stop()
		}
	})
	defer late.Stop()
	for _, s := range servers {
		s.GracefulStop()
	}
	serving.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}
