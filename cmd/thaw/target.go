package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"

	"github.com/thaw-project/thaw/kind"
	"github.com/thaw-project/thaw/spdk"
	"github.com/thaw-project/thaw/target"
	"github.com/thaw-project/thaw/target/devnode"
	"github.com/thaw-project/thaw/target/engine"
	"github.com/thaw-project/thaw/target/rpc"
)

const (
	defaultTargetRoot   = "/var/lib/thaw/target"
	defaultTargetSocket = "/run/thaw/target.sock"
)

type targetFlags struct {
	root, socket, engine, metrics, level string
	persist                              bool
}

func newTarget() *cobra.Command {
	var f targetFlags
	cmd := &cobra.Command{
		Use:   "target",
		Short: "Run a storage target that answers SPDK's JSON-RPC methods",
		Long: `Run a storage target that answers SPDK's JSON-RPC methods.

It keeps files, memory, lvols and remote NVMe namespaces as bdevs and shows them
over NVMe/TCP, NBD and ublk; SPDK's rpc.py and other tools written for SPDK work on
its socket. As with SPDK the configuration is gone when it ends, but for lvstores,
which come back with the bdev they lie on; with --persist it is all restored.
It may be killed at any time: what was written stays written.`,
		Example: `  thaw target --root /srv/thaw --persist
  thaw target call bdev_get_bdevs
  thaw target call bdev_aio_create --params '{"name":"aio0","filename":"/dev/sdb"}'
  rpc.py -s /run/thaw/target.sock bdev_get_bdevs`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var level slog.Level
			if err := level.UnmarshalText([]byte(f.level)); err != nil {
				return usage{fmt.Errorf("--log-level %.40q: must be debug, info, warn or error", f.level)}
			}
			debug.SetGCPercent(50)
			return f.run(cmd.Context(), slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})))
		},
	}
	cmd.PersistentFlags().StringVar(&f.socket, "socket", defaultTargetSocket, "Unix socket for JSON-RPC")
	cmd.Flags().StringVar(&f.root, "root", defaultTargetRoot, "directory that survives a reboot")
	cmd.Flags().BoolVar(&f.persist, "persist", false, "keep the configuration and restore it at the next start")
	cmd.Flags().StringVar(&f.engine, "engine", "", "shared-nothing (default) or thread-pool, for comparison")
	cmd.Flags().StringVar(&f.metrics, "metrics", "", "address for Prometheus, as 127.0.0.1:9600 (default none)")
	cmd.Flags().StringVar(&f.level, "log-level", "info", "debug, info, warn or error")
	cmd.AddCommand(targetCall(&f.socket))
	return cmd
}

// run serves until ctx ends. The socket appears when everything is restored.
func (f *targetFlags) run(ctx context.Context, log *slog.Logger) (err error) {
	how, err := engine.Parse(f.engine)
	if err != nil {
		return usage{fmt.Errorf("--engine: %w", err)}
	}
	if err := os.MkdirAll(filepath.Dir(f.socket), 0o700); err != nil {
		return fmt.Errorf("directory of the socket: %w", err)
	}
	calls := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "thaw_target_rpc_seconds", Help: "JSON-RPC calls, by method and code."}, []string{"method", "code"})
	t, err := target.New(target.Options{Root: f.root, Persist: f.persist, Engine: how, Version: buildVersion(), Log: log, Kernel: devnode.New(devnode.Options{Owner: f.root, Log: log})})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	l, err := rpc.Listen(f.socket)
	if err != nil {
		return err
	}
	server := rpc.Serve(l, rpc.Options{Methods: t.Methods(), Log: log, Called: func(method string, code int, took time.Duration) {
		calls.WithLabelValues(method, fmt.Sprint(code)).Observe(took.Seconds())
	}})
	defer server.Close()
	if f.metrics != "" {
		stop, err := serveMetrics(f.metrics, t, calls)
		if err != nil {
			return err
		}
		defer stop()
	}
	log.Info("target ready", "socket", f.socket, "root", f.root, "persist", f.persist)
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.Warn("tell systemd", "err", err)
	}
	<-ctx.Done()
	log.Info("target stops")
	return nil
}

// serveMetrics serves /metrics until the returned function is called.
func serveMetrics(address string, collectors ...prometheus.Collector) (stop func(), err error) {
	l, err := listenTCP("--metrics", address)
	if err != nil {
		return nil, err
	}
	registry := prometheus.NewRegistry()
	for _, c := range collectors {
		if err := registry.Register(c); err != nil {
			l.Close()
			return nil, fmt.Errorf("--metrics: %w", err)
		}
	}
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute}
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Serve(l) // ends with Close
	}()
	return func() {
		s.Close()
		<-done
	}, nil
}

// listenTCP listens at the address that a flag has.
func listenTCP(flag, address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	var wrong *net.AddrError
	switch {
	case err == nil:
		return l, nil
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, kind.Errorf(kind.InUse, "%s %s is in use by another program: choose another address", flag, address)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, kind.Errorf(kind.NotFound, "%s %s is no address of this machine", flag, address)
	case errors.As(err, &wrong):
		return nil, usage{fmt.Errorf("%s %.80q: must be an address with a port, as 127.0.0.1:9600", flag, address)}
	}
	return nil, fmt.Errorf("%s: %w", flag, err)
}

func targetCall(socket *string) *cobra.Command {
	var params string
	var asJSON bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "call METHOD",
		Short: "Call one JSON-RPC method of a target, ours or SPDK's",
		Long: `Call one JSON-RPC method of a target, ours or SPDK's, and print the result: a string
as it is, all else as JSON. An error is SPDK's text and code; the target's log has the
reason.`,
		Example: `  thaw target call bdev_get_bdevs --params '{"name":"aio0"}'
  thaw target call nvmf_get_subsystems --socket /var/tmp/spdk.sock`,
		Args: exactArgs(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			var raw any
			if params != "" {
				if raw = json.RawMessage(params); !json.Valid([]byte(params)) || !strings.HasPrefix(strings.TrimSpace(params), "{") {
					return usage{fmt.Errorf("--params must be a JSON object, as '{\"name\":\"aio0\"}'")}
				}
			}
			client, err := spdk.New(spdk.Options{Socket: *socket, Deadline: timeout, LongDeadline: timeout})
			if err != nil {
				return usage{err}
			}
			defer client.Close()
			var result json.RawMessage
			if err := client.Call(cmd.Context(), a[0], raw, &result); err != nil {
				return callError(err)
			}
			var text string
			if !asJSON && json.Unmarshal(result, &text) == nil {
				_, err = fmt.Fprintln(cmd.OutOrStdout(), text)
				return err
			}
			enc := json.NewEncoder(cmd.OutOrStdout())
			enc.SetEscapeHTML(false)
			enc.SetIndent("", "  ")
			return enc.Encode(result)
		},
	}
	cmd.Flags().StringVar(&params, "params", "", "the method's parameters, a JSON object")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a string as JSON too")
	cmd.Flags().DurationVar(&timeout, "timeout", 2*time.Minute, "for how long to wait for the answer")
	return cmd
}

// callError gives an answer that is an error the exit status that its code means to
// somebody at a shell, also where it has no sure kind.
func callError(err error) error {
	var e *spdk.Error
	if !errors.As(err, &e) || kind.Of(err) != "" && e.Code != spdk.CodeMethodNotFound && e.Code != -int(syscall.EBUSY) {
		return err
	}
	switch e.Code {
	case -int(syscall.EBUSY), -int(syscall.EALREADY):
		return kind.Wrap(kind.Exists, err)
	case spdk.CodeInvalidParams, spdk.CodeInvalidRequest, spdk.CodeMethodNotFound:
		return kind.Wrap(kind.Invalid, err)
	case -int(syscall.EPERM):
		return kind.Wrap(kind.Denied, err)
	}
	return err
}
