package main

import (
	"context"
	"fmt"
	"sort"
	"strings"
	"text/tabwriter"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/thaw-project/thaw/image/annotation"
	"github.com/thaw-project/thaw/kind"
)

func newSnapshot() *cobra.Command {
	var where place
	cmd := group("snapshot", "Look at containerd snapshots", snapshotList(&where), snapshotMounts(&where))
	where.register(cmd)
	return cmd
}

// withSnapshotter runs f with the snapshotter as containerd sees it.
func (p *place) withSnapshotter(cmd *cobra.Command, f func(context.Context, snapshots.Snapshotter) error) error {
	config, err := p.load()
	if err != nil {
		return err
	}
	conn, err := dial(cmd.Context(), config.Paths().SnapshotterSocket)
	if err != nil {
		return err
	}
	defer conn.Close()
	// The keys are containerd's, which carry its own namespace; the call needs
	// some namespace all the same.
	ctx := namespaces.WithNamespace(cmd.Context(), namespaces.Default)
	err = f(ctx, proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "thaw"))
	switch {
	case errdefs.IsNotFound(err):
		return kind.Wrap(kind.NotFound, err)
	case errdefs.IsFailedPrecondition(err):
		return kind.Wrap(kind.InUse, err)
	case errdefs.IsUnavailable(err):
		return kind.Wrap(kind.Unavailable, err)
	}
	return err
}

type snapshotInfo struct {
	Name      string            `json:"name"`
	Kind      string            `json:"kind"`
	Parent    string            `json:"parent,omitempty"`
	Block     string            `json:"block,omitempty"`
	Mode      string            `json:"mode,omitempty"`
	SizeBytes int64             `json:"size_bytes"`
	Inodes    int64             `json:"inodes"`
	Created   int64             `json:"created_unix_nanos"`
	Labels    map[string]string `json:"labels,omitempty"`
}

func snapshotList(where *place) *cobra.Command {
	return listing("List containerd snapshots and the blocks behind them", "  thaw snapshot list --json", func(cmd *cobra.Command, out *output) error {
		return where.withSnapshotter(cmd, func(ctx context.Context, s snapshots.Snapshotter) error {
			list := []snapshotInfo{}
			err := s.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
				list = append(list, snapshotInfo{
					Name: i.Name, Kind: strings.ToLower(i.Kind.String()), Parent: i.Parent, Labels: i.Labels,
					Block: i.Labels[annotation.Block], Mode: i.Labels[annotation.Mode], Created: i.Created.UnixNano(),
				})
				return nil
			})
			if err != nil {
				return err
			}
			for i := range list {
				u, err := s.Usage(ctx, list[i].Name)
				if err != nil {
					continue // removed since
				}
				list[i].SizeBytes, list[i].Inodes = u.Size, u.Inodes
			}
			sort.Slice(list, func(a, b int) bool { return list[a].Created < list[b].Created })
			return out.print(cmd.OutOrStdout(), list, func(w *tabwriter.Writer) {
				row(w, "NAME", "KIND", "SIZE", "MODE", "BLOCK", "CREATED")
				for _, i := range list {
					row(w, i.Name, i.Kind, bytesText(i.SizeBytes), dash(i.Mode), dash(i.Block), ageText(i.Created))
				}
			})
		})
	})
}

func snapshotMounts(where *place) *cobra.Command {
	var out output
	cmd := &cobra.Command{
		Use: "mounts NAME", Short: "Show the mounts containerd gets for an active snapshot", Args: exactArgs(1),
		Example: "  thaw snapshot mounts k8s.io/12/web",
		RunE: func(cmd *cobra.Command, a []string) error {
			return where.withSnapshotter(cmd, func(ctx context.Context, s snapshots.Snapshotter) error {
				mounts, err := s.Mounts(ctx, a[0])
				if errdefs.IsNotFound(err) {
					err = fmt.Errorf("no active containerd snapshot %.200q: 'thaw snapshot list' shows what there is: %w", a[0], errdefs.ErrNotFound)
				}
				if err != nil {
					return err
				}
				return out.print(cmd.OutOrStdout(), mounts, func(w *tabwriter.Writer) {
					row(w, "TYPE", "SOURCE", "OPTIONS")
					for _, m := range mounts {
						row(w, m.Type, m.Source, strings.Join(m.Options, ","))
					}
				})
			})
		},
	}
	out.register(cmd)
	return cmd
}
