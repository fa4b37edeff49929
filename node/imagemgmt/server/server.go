// Package server serves image-mgmt to snapshotters in other processes, by the contract of
// api/imagemgmt/v1.
//
// It translates and nothing else: limits, error kinds and who may call are those of the
// gRPC server that it is registered with (package attacher/rpc). It must not know how disks
// are shown.
package server

import (
	"context"

	imagemgmtv1 "github.com/thaw-project/thaw/api/imagemgmt/v1"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/present"
)

//go:generate protoc -I ../../../api --go_out=../../../api --go_opt=paths=source_relative --go-grpc_out=../../../api --go-grpc_opt=paths=source_relative imagemgmt/v1/imagemgmt.proto

// Server is the gRPC face of a Service.
type Server struct {
	imagemgmtv1.UnimplementedImageManagementServer
	service imagemgmt.Service
}

// New returns what to register with a gRPC server.
func New(s imagemgmt.Service) *Server { return &Server{service: s} }

var _ imagemgmtv1.ImageManagementServer = (*Server)(nil)

func blockOf(b *imagemgmtv1.Block) imagemgmt.Block {
	return imagemgmt.Block{Target: b.GetTarget(), Name: b.GetName()}
}

func layerOf(l *imagemgmtv1.Layer) imagemgmt.Layer {
	return imagemgmt.Layer{Block: blockOf(l.GetBlock()), Path: l.GetPath(), SizeBytes: l.GetSizeBytes()}
}

// disk is nil for one that is not shown.
func disk(d present.Disk) *imagemgmtv1.Disk {
	if d.ID == "" {
		return nil
	}
	out := &imagemgmtv1.Disk{
		Id: d.ID, Path: d.Path, BlockDevice: d.Block, SizeBytes: d.SizeBytes, ReadOnly: d.ReadOnly,
		Source: &imagemgmtv1.Source{Kind: string(d.Source.Kind), Lvol: d.Source.Lvol, Target: d.Source.Target, Path: d.Source.Path},
	}
	if n := d.NVMe; n != nil {
		out.Nvme = &imagemgmtv1.NVMe{Uuid: n.UUID, Serial: n.Serial, Function: n.Function}
	}
	return out
}

func attachment(a imagemgmt.Attachment) *imagemgmtv1.Attachment {
	out := &imagemgmtv1.Attachment{Block: a.Block, Disk: disk(a.Disk), Users: a.Users}
	for _, d := range a.Layers {
		out.Layers = append(out.Layers, disk(d))
	}
	return out
}

// Attach implements imagemgmtv1.ImageManagementServer.
func (s *Server) Attach(ctx context.Context, r *imagemgmtv1.AttachRequest) (*imagemgmtv1.Disk, error) {
	d, err := s.service.Attach(ctx, blockOf(r.GetBlock()), r.GetUser())
	if err != nil {
		return nil, err
	}
	return disk(d), nil
}

// Detach implements imagemgmtv1.ImageManagementServer.
func (s *Server) Detach(ctx context.Context, r *imagemgmtv1.DetachRequest) (*imagemgmtv1.DetachResponse, error) {
	if err := s.service.Detach(ctx, r.GetBlock(), r.GetUser()); err != nil {
		return nil, err
	}
	return &imagemgmtv1.DetachResponse{}, nil
}

// Stat implements imagemgmtv1.ImageManagementServer.
func (s *Server) Stat(ctx context.Context, r *imagemgmtv1.StatRequest) (*imagemgmtv1.Attachment, error) {
	a, err := s.service.Stat(ctx, r.GetBlock())
	if err != nil {
		return nil, err
	}
	return attachment(a), nil
}

// List implements imagemgmtv1.ImageManagementServer.
func (s *Server) List(ctx context.Context, _ *imagemgmtv1.ListRequest) (*imagemgmtv1.ListResponse, error) {
	all, err := s.service.List(ctx)
	if err != nil {
		return nil, err
	}
	out := &imagemgmtv1.ListResponse{Attachments: make([]*imagemgmtv1.Attachment, 0, len(all))}
	for _, a := range all {
		out.Attachments = append(out.Attachments, attachment(a))
	}
	return out, nil
}

// AttachWritable implements imagemgmtv1.ImageManagementServer.
func (s *Server) AttachWritable(ctx context.Context, r *imagemgmtv1.AttachWritableRequest) (*imagemgmtv1.Disk, error) {
	d, err := s.service.AttachWritable(ctx, layerOf(r.GetLayer()), r.GetId())
	if err != nil {
		return nil, err
	}
	return disk(d), nil
}

// DetachWritable implements imagemgmtv1.ImageManagementServer.
func (s *Server) DetachWritable(ctx context.Context, r *imagemgmtv1.DetachWritableRequest) (*imagemgmtv1.DetachWritableResponse, error) {
	if err := s.service.DetachWritable(ctx, r.GetBlock(), r.GetId()); err != nil {
		return nil, err
	}
	return &imagemgmtv1.DetachWritableResponse{}, nil
}

// DeleteWritable implements imagemgmtv1.ImageManagementServer.
func (s *Server) DeleteWritable(ctx context.Context, r *imagemgmtv1.DeleteWritableRequest) (*imagemgmtv1.DeleteWritableResponse, error) {
	if err := s.service.DeleteWritable(ctx, layerOf(r.GetLayer()), r.GetId()); err != nil {
		return nil, err
	}
	return &imagemgmtv1.DeleteWritableResponse{}, nil
}

// StatWritable implements imagemgmtv1.ImageManagementServer.
func (s *Server) StatWritable(ctx context.Context, r *imagemgmtv1.StatWritableRequest) (*imagemgmtv1.Writable, error) {
	w, err := s.service.StatWritable(ctx, layerOf(r.GetLayer()), r.GetId())
	if err != nil {
		return nil, err
	}
	return &imagemgmtv1.Writable{Disk: disk(w.Disk), AllocatedBytes: w.AllocatedBytes, Files: w.Files}, nil
}

// EnsureScratch implements imagemgmtv1.ImageManagementServer.
func (s *Server) EnsureScratch(ctx context.Context, r *imagemgmtv1.EnsureScratchRequest) (*imagemgmtv1.Block, error) {
	b, err := s.service.EnsureScratch(ctx, r.GetTarget(), r.GetSizeBytes())
	if err != nil {
		return nil, err
	}
	return &imagemgmtv1.Block{Target: b.Target, Name: b.Name}, nil
}

// Prefetch implements imagemgmtv1.ImageManagementServer.
func (s *Server) Prefetch(r *imagemgmtv1.PrefetchRequest, stream imagemgmtv1.ImageManagement_PrefetchServer) error {
	ranges := make([]imagemgmt.Range, len(r.GetRanges()))
	for i, x := range r.GetRanges() {
		ranges[i] = imagemgmt.Range{OffsetBytes: x.GetOffsetBytes(), LengthBytes: x.GetLengthBytes()}
	}
	return s.service.Prefetch(stream.Context(), r.GetBlock(), ranges, func(read int64) {
		// A caller that is gone ends the stream's context, and so the call.
		_ = stream.Send(&imagemgmtv1.PrefetchProgress{ReadBytes: read})
	})
}
