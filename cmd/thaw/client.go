package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/daemon"
	"github.com/thaw-project/thaw/kind"
)

// place says which server a command talks to: the one whose configuration, root and
// run directories it is given.
type place struct {
	config, root, run string
	roles             []string
	process           daemon.Process // that a command runs
}

func (p *place) register(cmd *cobra.Command) {
	f := cmd.PersistentFlags()
	f.StringVar(&p.config, "config", "", "configuration file (default "+daemon.DefaultConfigPath+" if it exists)")
	f.StringVar(&p.root, "root", "", "directory that survives a reboot (default "+daemon.DefaultRoot+")")
	f.StringVar(&p.run, "run", "", "directory for sockets and mounts (default "+daemon.DefaultRun+")")
}

func (p *place) load() (daemon.Config, error) {
	config, err := daemon.LoadConfig(p.config)
	if err != nil {
		return config, err
	}
	if p.root != "" {
		config.Root = p.root
	}
	if p.run != "" {
		config.Run = p.run
	}
	if len(p.roles) > 0 {
		config.Roles = p.roles
	}
	if err := config.As(p.process); err != nil {
		return config, err
	}
	return config, config.Validate()
}

// part connects to the part of this machine that role names, in whichever process it is.
func (p *place) part(ctx context.Context, role string) (*grpc.ClientConn, error) {
	config, err := p.load()
	if err != nil {
		return nil, err
	}
	sockets := config.Sockets(role)
	var missing error
	for _, s := range sockets {
		conn, err := dial(ctx, s, rpc.DialOptions()...)
		if !errors.Is(err, kind.Unavailable) {
			return conn, err
		}
		missing = err
	}
	if start := starts[role]; errors.Is(missing, errNobody) {
		return nil, kind.Errorf(kind.Unavailable, "nobody listens on %s: start %s, or name its --run directory", strings.Join(sockets, " or "), start)
	}
	return nil, missing
}

// starts says what runs the part that a role names.
var starts = map[string]string{
	daemon.RoleStore:  "'thaw server' or 'thaw attacher'",
	daemon.RoleCard:   "'thaw attacher --role card' on the card",
	daemon.RoleImages: "'thaw server' or 'thaw image-mgmt'",
}

// whoListens says what has to run for somebody to listen on a socket.
func whoListens(socket string) string {
	for _, p := range []daemon.Process{daemon.ProcessAttacher, daemon.ProcessImages, daemon.ProcessSnapshots} {
		if filepath.Base(socket) == string(p)+".sock" {
			return fmt.Sprintf("'thaw server' or 'thaw %s'", p)
		}
	}
	return "'thaw server'"
}

// errNobody is below what dial returns when nobody listens.
var errNobody = errors.New("nobody listens")

// dial connects to one of the server's sockets and fails at once, with what to do,
// when nobody listens.
func dial(ctx context.Context, socket string, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	probe, err := d.DialContext(ctx, "unix", socket)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return nil, kind.Errorf(kind.Unavailable, "%w on %s: start %s, or name its --run directory", errNobody, socket, whoListens(socket))
	case errors.Is(err, fs.ErrPermission):
		return nil, kind.Errorf(kind.Denied, "connect to %s: permission denied: run as root", socket)
	case err != nil:
		return nil, kind.Errorf(kind.Unavailable, "connect to the thaw server: %w", err)
	}
	probe.Close()
	if len(options) == 0 {
		options = []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	}
	return grpc.NewClient("unix://"+socket, options...)
}

// attacherClient connects to the server's attacher.
func (p *place) attacherClient(ctx context.Context) (attacherv1.AttacherClient, func(), error) {
	conn, err := p.part(ctx, daemon.RoleStore)
	if err != nil {
		return nil, nil, err
	}
	return attacherv1.NewAttacherClient(conn), func() { conn.Close() }, nil
}
